"""Which tensor gets which type: llama.cpp's mixtures, and what a row that does not fit gets.

Source: llama_tensor_get_type_impl, tensor_allows_quantization and tensor_type_fallback in
src/llama-quant.cpp of llama.cpp b11549.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from mule.errors import ModelError

_T = GGMLQuantizationType
# Name on the command line -> the type of most matrices, and the number that names the mixture.
TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (_T.F32, LlamaFileType.ALL_F32),
    "f16": (_T.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (_T.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (_T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": (_T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (_T.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q5_k_s": (_T.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "q4_k_m": (_T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q4_k_s": (_T.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "iq4_xs": (_T.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS),
    "q3_k_m": (_T.Q3_K, LlamaFileType.MOSTLY_Q3_K_M),
    "q2_k": (_T.Q2_K, LlamaFileType.MOSTLY_Q2_K),
    "mxfp4": (_T.MXFP4, LlamaFileType.MOSTLY_MXFP4_MOE),
}
_SMALLER_BLOCKS = {
    _T.Q2_K: _T.Q4_0,
    _T.Q3_K: _T.Q4_0,
    _T.IQ4_XS: _T.IQ4_NL,
    _T.Q4_K: _T.Q5_0,
    _T.Q5_K: _T.Q5_1,
    _T.Q6_K: _T.Q8_0,
}
_FULL = frozenset({_T.F32, _T.F16, _T.BF16})
# Kept in float32: norms, the router of experts, the short convolution of Mamba.
_FULL_NAMES = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight")
# Of a mixture of eight, as Mixtral's is: small beside the experts, so more bits cost little.
_EIGHT = 8
_OF_EIGHT = {"attn_v": _T.Q8_0, "attn_k": _T.Q8_0, "attn_output": _T.Q5_K}
_FINER = frozenset({"q8_0", "q6_k", "q5_k_m", "q5_k_s"})  # these are no less already
_MANY_GROUPED = 4  # query heads that share a key/value head, from which v gets more bits


@dataclass(frozen=True)
class Mixture:
    """One type for a model: of `num_layers`, of which those `attending` have attention (None: all).

    `grouped`: query heads that share a key/value head in the first layer, 0 if that does not attend.
    `weighed`: with an importance matrix. `experts` of a mixture; 0: none.
    """

    type_name: str
    num_layers: int
    tied: bool
    grouped: int = 1
    weighed: bool = False
    attending: tuple[int, ...] | None = None
    experts: int = 0

    def __post_init__(self) -> None:
        if self.type_name == "mxfp4" and not self.experts:
            raise ModelError(
                "mxfp4 is for models with experts: llama.cpp's MXFP4_MOE stores the experts' "
                "matrices in 4-bit floats and all others as q8_0, so a dense model would become "
                "q8_0 throughout",
                "take q4_k_m, or iq4_xs for 4.3 bits a weight; q8_0 if that is what you want",
            )

    def tensor_type(
        self, name: str, shape: tuple[int, ...]
    ) -> tuple[GGMLQuantizationType, GGMLQuantizationType]:
        """The type of one GGUF tensor: as the mixture wants it, and as its row length allows."""
        dimensions = len(shape) - next((i for i, size in enumerate(shape) if size > 1), len(shape))
        if dimensions < 2 or not name.endswith(".weight") or name.endswith(_FULL_NAMES):
            return _T.F32, _T.F32
        wanted = TYPES[self.type_name][0]
        if wanted == _T.MXFP4:
            wanted = wanted if dimensions > 2 else _T.Q8_0
        elif wanted not in _FULL:
            wanted = self._mixed(name, wanted)
        return wanted, _fitting(wanted, shape[-1])

    def _mixed(self, name: str, most: GGMLQuantizationType) -> GGMLQuantizationType:
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return most if most == _T.Q8_0 else _T.Q6_K
        part = name.split(".")
        if part[0] != "blk":
            return most
        matrix = part[2].removesuffix("_exps").removesuffix("_shexp")
        matrix = "attn_v" if matrix == "attn_qkv" else matrix
        if self.experts == _EIGHT and matrix in _OF_EIGHT:
            more = _OF_EIGHT[matrix]
            return most if more == _T.Q5_K and self.type_name in _FINER else more
        if self.type_name not in _MORE_BITS:
            return most
        return _MORE_BITS[self.type_name](self, matrix, *self._place(matrix, int(part[1]))) or most

    def _place(self, matrix: str, layer: int) -> tuple[int, int]:
        """The number of a matrix among those of its kind, and how many there are."""
        if matrix == "attn_v" and self.attending is not None:
            return self.attending.index(layer), len(self.attending)
        return layer, self.num_layers


_Chosen = GGMLQuantizationType | None


def _medium(_: Mixture, matrix: str, layer: int, layers: int) -> _Chosen:
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return _T.Q6_K if more and matrix in ("attn_v", "ffn_down") else None


def _q4_k_s(_: Mixture, matrix: str, layer: int, layers: int) -> _Chosen:
    first = {"attn_v": 4, "ffn_down": layers // 8}.get(matrix, 0)
    return _T.Q5_K if layer < first else None


def _iq4_xs(mixture: Mixture, matrix: str, layer: int, layers: int) -> _Chosen:
    grouped = matrix == "attn_v" and mixture.grouped >= _MANY_GROUPED
    early = matrix == "ffn_down" and layer < layers // 8 and not mixture.weighed
    return _T.Q5_K if grouped or early else None


def _q3_k_m(_: Mixture, matrix: str, layer: int, layers: int) -> _Chosen:
    if matrix not in ("attn_v", "ffn_down", "attn_output"):
        return None
    first = {"attn_v": 2, "ffn_down": layers // 16}.get(matrix, 0)
    return _T.Q5_K if layer < first else _T.Q4_K


def _q2_k(mixture: Mixture, matrix: str, _layer: int, _layers: int) -> _Chosen:
    if matrix == "attn_v" and mixture.grouped >= _MANY_GROUPED:
        return _T.Q4_K
    return _T.Q3_K if matrix in ("attn_v", "ffn_down", "attn_output") else None


_MORE_BITS: dict[str, Callable[[Mixture, str, int, int], _Chosen]] = {
    "q5_k_m": _medium,
    "q4_k_m": _medium,
    "q4_k_s": _q4_k_s,
    "iq4_xs": _iq4_xs,
    "q3_k_m": _q3_k_m,
    "q2_k": _q2_k,
}


def _fitting(wanted: GGMLQuantizationType, row_length: int) -> GGMLQuantizationType:
    for kind in (wanted, _SMALLER_BLOCKS.get(wanted, wanted)):
        if row_length % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return _T.F16


def num_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """The size of a tensor of `shape` in blocks of `kind`."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes
