"""What each GGUF type is, in words, with the bits that most of its numbers take."""

from __future__ import annotations

from typing import Any

from gguf.constants import GGML_QUANT_SIZES

from mule.export.mixtures import TYPES

_MEANS = {
    "f32": "every number as it is computed; for proofs and further work",
    "f16": "16-bit floats: fine steps, a narrow range",
    "bf16": "16-bit floats: coarse steps, the range of 32 bits; exact for weights stored in it",
    "q8_0": "8 bits, a scale for every 32 numbers: hardly to be told from the model",
    "q6_k": "6 bits in blocks of 256: close to q8_0 at three quarters of its size",
    "q5_k_m": "5 bits, the most sensitive matrices in 6",
    "q5_k_s": "5 bits throughout, a little smaller",
    "q4_k_m": "4 bits, the most sensitive matrices in 6: the usual choice to run at home",
    "q4_k_s": "4 bits, few matrices in more: a little smaller",
    "iq4_xs": "4 bits with uneven steps: smaller than q4_k_s; an importance matrix helps it",
    "q3_k_m": "3 bits: small, and the loss begins to show",
    "q2_k": "2 bits: the smallest, for large models only; verify it",
    "mxfp4": "experts in 4-bit floats, all else in 8 bits: for mixtures of experts only",
}


def type_rows() -> list[dict[str, Any]]:
    """Every type with its meaning, and the bits of its blocks; mixtures take more in places."""
    rows = []
    for name, (kind, _) in TYPES.items():
        numbers, num_bytes = GGML_QUANT_SIZES[kind]
        rows.append({"type": name, "bits": 8 * num_bytes / numbers, "means": _MEANS[name]})
    return rows
