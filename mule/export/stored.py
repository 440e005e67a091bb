"""The numbers of a GGUF file's tensors, a few rows at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from mule.errors import ModelError
from mule.export.mixtures import num_bytes
from mule.export.quantize import FileTensor, Quantizer, encode
from mule.generate.gguf_header import GgufHeader, TensorInfo
from mule.generate.weight_rows import WeightRows

_CHUNK_WEIGHTS = 1 << 22  # made into float32 at a time: 16 MB, and a few times that in between
_NUMBERS = frozenset(
    {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
)


class StoredTensors:
    """The tensors of a file whose header was read; nothing of them stays in memory."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.infos = {tensor.name: tensor for tensor in header.tensors}

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """The whole tensor, dequantised, in its shape.

        Raises ModelError for a type that cannot be dequantised here.
        """
        out = np.empty(self.infos[name].shape, np.float32)
        rows = out.reshape(-1, out.shape[-1])
        for start, part in self.parts(name):
            rows[start : start + len(part)] = part
        return out

    def parts(self, name: str) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """The tensor's rows, some at a time, each time with the number of the first."""
        info, blocks = self.infos[name], self.blocks(name)
        step = max(1, _CHUNK_WEIGHTS // info.shape[-1])
        for start in range(0, blocks.shape[0], step):
            yield start, in_numbers(blocks[start : start + step], info.type)

    def rows(self, name: str, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Some rows of the tensor."""
        return in_numbers(self.blocks(name)[chosen], self.infos[name].type)

    def blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, mapped: (rows, bytes a row)."""
        info = self.infos[name]
        row_bytes = num_bytes(info.shape[-1:], info.type)
        shape = (info.num_bytes // row_bytes, row_bytes)
        place = self.header.data_start + info.offset
        return np.memmap(self.header.file, np.uint8, "r", place, shape)


def in_numbers(blocks: npt.NDArray, kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """Rows of blocks, dequantised; ModelError for a type that gguf cannot dequantise."""
    content = np.ascontiguousarray(blocks)
    try:
        with np.errstate(all="ignore"):  # a damaged scale is NaN: that is told, not warned of
            return dequantize(content.view(np.uint8), kind).astype(np.float32, copy=False)
    except NotImplementedError:
        raise ModelError(
            f"blocks of {kind.name} cannot be made into numbers here",
            "export one of the types that `mule export` writes",
        ) from None


def can_be_numbers(info: TensorInfo) -> bool:
    """Whether gguf dequantises this type."""
    _, block_bytes = GGML_QUANT_SIZES[info.type]
    try:
        in_numbers(np.zeros((1, block_bytes), np.uint8), info.type)
    except ModelError:
        return False
    return True


def through_blocks(
    quantizer: Quantizer, name: str, rows: npt.NDArray[np.float32], kind: GGMLQuantizationType
) -> npt.NDArray[np.float32]:
    """`rows` as a file of `kind` would hold them: quantised, and dequantised again.

    Raises ModelError for NaN and infinity, and where only llama.cpp makes such blocks and is absent;
    NotImplementedError for a type that nobody makes here.
    """
    return in_numbers(in_blocks(quantizer, name, rows, kind), kind)


def in_blocks(
    quantizer: Quantizer, name: str, rows: npt.NDArray[np.float32], kind: GGMLQuantizationType
) -> npt.NDArray[np.uint8]:
    """`rows` as the bytes of `kind`, (rows, bytes a row); errors as of `through_blocks`."""
    rows = np.ascontiguousarray(rows, np.float32)
    if kind in _NUMBERS:
        return encode(name, rows, kind).view(np.uint8).reshape(len(rows), -1)
    quantizer.require([kind])
    with tempfile.TemporaryDirectory(prefix="mule-verify-") as scratch:
        given, made = Path(scratch) / "rows", Path(scratch) / "blocks"
        given.write_bytes(rows.tobytes())
        made.write_bytes(b"")
        stored = WeightRows(str(given), 0, "F32", *rows.shape)
        quantizer.write(made, [FileTensor(name, name, (stored,), kind, 0)], lambda _: None)
        return np.fromfile(made, np.uint8).reshape(len(rows), -1)
