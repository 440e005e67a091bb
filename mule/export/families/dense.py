"""Families with one MLP a block: Llama and its kin."""

from __future__ import annotations

from typing import Any

from gguf.constants import MODEL_ARCH, Keys

from mule.export.families.shape import (
    ALL_SCALINGS,
    ATTENTION,
    NO_WINDOW,
    NORMS,
    QK_NORMS,
    QKV_BIAS,
    SILU,
    Family,
    ModelShape,
    Words,
    granite_scales,
)
from mule.export.rope import DEFAULT_THETA

_FEEDFORWARD_NORMS: Words = {
    "pre_feedforward_layernorm": ("hidden",),
    "post_feedforward_layernorm": ("hidden",),
}
_MLP: Words = {
    "mlp.gate_proj": ("ffn", "hidden"),
    "mlp.up_proj": ("ffn", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
}
_FUSED: Words = {
    "self_attn.qkv_proj": ("query_key_value", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "mlp.gate_up_proj": ("gate_up", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
}
_PLAIN: Words = {**NORMS, **ATTENTION, **_MLP}
_ALL_BIASES = frozenset(ATTENTION) | frozenset(_MLP)
_NOPE_STEP = 4  # SmolLM3 in llama.cpp: every fourth layer is not turned
_GEMMA_PERIOD = 6  # Gemma 3 in llama.cpp: every sixth layer sees all tokens
_GEMMA_27B_LAYERS = 62  # of which llama.cpp knows another query scale


def _gemma(raw: dict[str, Any], shape: ModelShape) -> None:
    """Source: Gemma3TextConfig of transformers; src/models/gemma3.cpp of llama.cpp."""
    period = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", _GEMMA_PERIOD))
    wanted = [bool((layer + 1) % period) for layer in range(shape.layers)]
    if kinds := raw.get("layer_types"):
        wanted = [kind == "sliding_attention" for kind in kinds[: shape.layers]]
    if any(wanted):
        _gemma_windows(raw, shape, wanted)
    if softcap := raw.get("final_logit_softcapping"):
        shape.keys[Keys.LLM.FINAL_LOGIT_SOFTCAPPING] = float(softcap)
    scalar = raw.get("query_pre_attn_scalar", 256)
    used = shape.hidden / shape.heads if shape.layers == _GEMMA_27B_LAYERS else shape.head_dim
    if scalar != used:
        raise ValueError(f"query_pre_attn_scalar = {scalar}, and llama.cpp divides by √{used:g}")


def _gemma_windows(raw: dict[str, Any], shape: ModelShape, sliding: list[bool]) -> None:
    if sliding != [bool((layer + 1) % _GEMMA_PERIOD) for layer in range(shape.layers)]:
        raise ValueError(
            f"its layers with a sliding window are not all but every {_GEMMA_PERIOD}th"
        )
    if shape.rope.kind == "yarn":
        raise ValueError("yarn beside sliding windows, whose layers would be scaled too")
    shape.keys[Keys.Attention.SLIDING_WINDOW] = raw.get("sliding_window", 4096)
    shape.keys[Keys.Rope.FREQ_BASE_SWA] = shape.rope.local_theta or DEFAULT_THETA


def _smollm3(raw: dict[str, Any], shape: ModelShape) -> None:
    step = raw.get("no_rope_layer_interval", _NOPE_STEP)
    turned = [int((layer + 1) % step != 0) for layer in range(shape.layers)]
    turned = (raw.get("no_rope_layers") or turned)[: shape.layers]
    if turned != [int((layer + 1) % _NOPE_STEP != 0) for layer in range(shape.layers)]:
        raise ValueError(f"layers without RoPE other than every {_NOPE_STEP}th")


def _phi3(raw: dict[str, Any], shape: ModelShape) -> None:
    shape.keys[Keys.Rope.SCALING_ORIG_CTX_LEN] = shape.rope.original_context
    shape.keys[Keys.Attention.SLIDING_WINDOW] = raw.get("sliding_window") or 0
    _whole_window(raw, shape)


def _whole_window(raw: dict[str, Any], shape: ModelShape) -> None:
    """llama.cpp sees all tokens where this model sees a window: the same up to its length."""
    window = raw.get("sliding_window")
    if window and window < shape.context:
        shape.reach.append(window)
        shape.notes.append(
            f"attention reaches {window:,} tokens back in the model and all the way in llama.cpp: "
            f"beyond {window:,} tokens the answers differ"
        )


DENSE = {
    "llama": Family(
        arch=MODEL_ARCH.LLAMA,
        permuted=True,
        layer=_PLAIN,
        biases=_ALL_BIASES,
        required=SILU,
        scalings=ALL_SCALINGS,
    ),
    "mistral": Family(
        arch=MODEL_ARCH.LLAMA,
        permuted=True,
        layer=_PLAIN,
        required=SILU,
        scalings=ALL_SCALINGS,
        more=_whole_window,
    ),
    "qwen2": Family(
        arch=MODEL_ARCH.QWEN2,
        permuted=False,
        layer=_PLAIN,
        biases=QKV_BIAS,
        always_biased=True,
        required=SILU | NO_WINDOW,
    ),
    "qwen3": Family(
        arch=MODEL_ARCH.QWEN3,
        permuted=False,
        layer={**NORMS, **ATTENTION, **QK_NORMS, **_MLP},
        biases=QKV_BIAS,
        required=SILU | NO_WINDOW,
    ),
    "gemma3_text": Family(
        arch=MODEL_ARCH.GEMMA3,
        permuted=False,
        layer={**NORMS, **_FEEDFORWARD_NORMS, **ATTENTION, **QK_NORMS, **_MLP},
        required={
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        norm_offset=1.0,
        default_theta=1_000_000.0,
        more=_gemma,
    ),
    "smollm3": Family(
        arch=MODEL_ARCH.SMOLLM3,
        permuted=True,
        layer=_PLAIN,
        biases=_ALL_BIASES,
        required=SILU | NO_WINDOW,
        default_theta=2_000_000.0,
        more=_smollm3,
    ),
    "phi3": Family(
        arch=MODEL_ARCH.PHI3,
        permuted=False,
        layer={**NORMS, **_FUSED},
        required=SILU,
        scalings=frozenset({"default", "longrope"}),
        partial=True,
        more=_phi3,
    ),
    "granite": Family(
        arch=MODEL_ARCH.GRANITE,
        permuted=True,
        layer=_PLAIN,
        biases=_ALL_BIASES,
        required=SILU,
        scalings=ALL_SCALINGS,
        more=granite_scales,
    ),
}
