"""Which tensor gets which type, and the blocks themselves.

The blocks come from llama.cpp's own code in a child process, so a file is byte for byte what
llama-quantize writes; where that runtime is absent, NumPy makes them (kquants.py).
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize as quantize_simple

from mule.errors import ModelError
from mule.export.kquants import KQUANTS
from mule.generate.llamacpp import Runtime

_T = GGMLQuantizationType
# Name on the command line -> the type of most matrices, and the number that names the mixture.
TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (_T.F32, LlamaFileType.ALL_F32),
    "f16": (_T.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (_T.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (_T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": (_T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (_T.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": (_T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
}
_SMALLER_BLOCKS = {_T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}
_NATIVE = frozenset({_T.Q4_K, _T.Q5_K, _T.Q6_K, _T.Q5_0, _T.Q5_1})
_CHUNK_BYTES = 64 * 2**20  # sent to the child at a time
_F16_MAX = 65504.0


def tensor_type(
    name: str, shape: tuple[int, ...], type_name: str, num_layers: int, tied: bool
) -> tuple[GGMLQuantizationType, GGMLQuantizationType]:
    """The type of one GGUF tensor: as the recipe wants it, and as its row length allows.

    Source: llama_tensor_get_type_impl, tensor_allows_quantization and tensor_type_fallback in
    src/llama-quant.cpp of llama.cpp b11549 (dense models).
    """
    if len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight"):
        return _T.F32, _T.F32
    wanted = TYPES[type_name][0]
    if wanted in _SMALLER_BLOCKS:
        head = name == "output.weight" or (tied and name == "token_embd.weight")
        mixed = type_name.endswith("_m") and name.endswith(("attn_v.weight", "ffn_down.weight"))
        if head or (mixed and _more_bits(int(name.split(".")[1]), num_layers)):
            wanted = _T.Q6_K
    return wanted, _fitting(wanted, shape[-1])


def _more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _fitting(wanted: GGMLQuantizationType, row_length: int) -> GGMLQuantizationType:
    for kind in (wanted, _SMALLER_BLOCKS.get(wanted, wanted)):
        if row_length % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return _T.F16


def num_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """The size of a tensor of `shape` in blocks of `kind`."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


class Quantizer:
    """Turns float32 tensors into the bytes of a type; starts its child when first needed.

    `native` is None until then; afterwards it says whether llama.cpp made the blocks, and
    `reason` why not.
    """

    def __init__(self, *, native: bool | None = None) -> None:
        self.native = native
        self.reason = "" if native is not False else "asked for"
        self._runtime: Runtime | None = None

    def encode(self, name: str, values: npt.NDArray, kind: GGMLQuantizationType) -> npt.NDArray:
        """`values` as (rows, bytes a row) uint8, or as float32/float16 for these two types.

        Raises ModelError, naming the tensor, for NaN, infinity or what float16 cannot hold.
        """
        values = np.ascontiguousarray(values, np.float32)
        if not np.isfinite(values).all():
            raise ModelError(f"{name} holds NaN or infinite values", "export an earlier checkpoint")
        if kind == _T.F32:
            return values
        if kind == _T.F16:
            return _to_f16(name, values)
        rows = values.reshape(-1, values.shape[-1])
        if kind not in _NATIVE:
            return quantize_simple(rows, kind)
        if self._start():
            return self._encode_native(rows, kind)
        return KQUANTS[kind](rows) if kind in KQUANTS else quantize_simple(rows, kind)

    def _start(self) -> bool:
        if self.native is None:
            try:
                self._runtime = Runtime("quantising")
                self.native = True
            except ModelError as error:
                self.native, self.reason = False, error.message
        elif self.native and self._runtime is None:
            self._runtime = Runtime("quantising")
        return self.native

    def _encode_native(self, rows: npt.NDArray, kind: GGMLQuantizationType) -> npt.NDArray:
        assert self._runtime is not None
        row_bytes = num_bytes(rows.shape[1:], kind)
        out = np.empty((rows.shape[0], row_bytes), np.uint8)
        step = max(1, _CHUNK_BYTES // (4 * rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step]
            _, data = self._runtime.request(
                "quantize",
                part.data.cast("B"),
                type_id=int(kind),
                rows=part.shape[0],
                columns=part.shape[1],
                row_bytes=row_bytes,
            )
            out[start : start + step] = np.frombuffer(data, np.uint8).reshape(-1, row_bytes)
        return out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None


def _to_f16(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    largest = float(np.abs(values).max(initial=0.0))
    if largest > _F16_MAX:
        raise ModelError(
            f"{name} holds {largest:.4g}; float16 ends at {_F16_MAX:.0f}",
            "export with --type bf16, which has the range of float32",
        )
    return values.astype(np.float16)
