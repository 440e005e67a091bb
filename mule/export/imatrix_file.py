"""Importance matrices in llama.cpp's own file format, so that llama-quantize reads ours and we its.

Source: IMatrixCollector::save_imatrix in tools/imatrix/imatrix.cpp and load_imatrix in
tools/quantize/quantize.cpp of llama.cpp b11549.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, Keys

from mule import fsio
from mule.errors import ModelError
from mule.generate.gguf_header import GgufHeader, TensorInfo, read_header

FILE_NAME = "imatrix.gguf"
_SQUARES, _COUNTS = ".in_sum2", ".counts"
_KEYS = Keys.IMatrix
_F32 = GGMLQuantizationType.F32


@dataclass(frozen=True, eq=False)
class ImportanceMatrix:
    """Of every matrix: the sums of the squares of what each of its columns is multiplied with.

    `squares` (columns) float32 and `counts`, the tokens that were summed, by the name in a file; of
    experts (experts, columns), and how many tokens each of them saw.
    `dataset` says in words what the tokens were; they came `chunk_tokens` at a time.
    """

    squares: Mapping[str, npt.NDArray[np.float32]]
    counts: Mapping[str, int | tuple[int, ...]]
    dataset: str
    chunk_tokens: int

    @property
    def num_tokens(self) -> int:
        return int(max(np.max(count) for count in self.counts.values()))

    @property
    def num_chunks(self) -> int:
        return -(-self.num_tokens // self.chunk_tokens)

    def columns(self) -> dict[str, npt.NDArray[np.float32]]:
        """The mean squares, as ggml's quantisers take them; ones of an expert that saw no token."""
        columns = {}
        for name, sums in self.squares.items():
            tokens = np.asarray(self.counts[name], np.float32)[..., None]
            means = np.where(tokens > 0, sums / np.maximum(tokens, 1), 1)
            columns[name] = np.ascontiguousarray(means, np.float32)
        return columns

    def entries(self) -> dict[str, str | int]:
        """What a file that was quantised with it says of it; llama-quantize's keys."""
        return {
            "quantize.imatrix.file": FILE_NAME,
            "quantize.imatrix.dataset": self.dataset,
            "quantize.imatrix.entries_count": len(self.squares),
            "quantize.imatrix.chunks_count": self.num_chunks,
        }

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ModelError unless the tensors of these shapes, by name, are those it is about."""
        hint = "give the matrix of this model, or let Mule compute it: --imatrix alone"
        for name, sums in self.squares.items():
            if name not in shapes:
                raise ModelError(f"the importance matrix has {name}, the model does not", hint)
            *experts, _rows, columns = shapes[name]
            if sums.shape != (*experts, columns):
                raise ModelError(
                    f"the importance matrix has {sums.size} columns for {name}, "
                    f"the model {math.prod((*experts, columns))}",
                    hint,
                )


def write_imatrix(file: Path, matrix: ImportanceMatrix) -> None:
    """Write `matrix` in the GGUF format of llama-imatrix."""
    writer = GGUFWriter(None, "")
    writer.kv_data[0].clear()  # such a file names no architecture
    writer.add_type("imatrix")
    writer.add_array(_KEYS.DATASETS, [matrix.dataset])
    writer.add_uint32(_KEYS.CHUNK_COUNT, matrix.num_chunks)
    writer.add_uint32(_KEYS.CHUNK_SIZE, matrix.chunk_tokens)
    for name in sorted(matrix.squares):
        writer.add_tensor(f"{name}{_SQUARES}", matrix.squares[name])
        counts = np.array(matrix.counts[name], np.float32).reshape(-1, 1)
        writer.add_tensor(f"{name}{_COUNTS}", counts if len(counts) > 1 else counts[0])
    with fsio.stream_file(file, _require_readable) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _require_readable(file: Path) -> None:
    read_imatrix(file)


def is_imatrix(header: GgufHeader) -> bool:
    """Whether a GGUF file is an importance matrix, and no model."""
    return header.metadata.get("general.type") == "imatrix"


def read_imatrix(file: Path) -> ImportanceMatrix:
    """A matrix that Mule or llama-imatrix wrote.

    Raises ModelError for another file, and for numbers that no sum of squares can be.
    """
    header = read_header(file)
    hint = "give a file of llama-imatrix or of `mule export --imatrix`, or texts: a .jsonl file"
    if not is_imatrix(header):
        raise ModelError(f"{file}: a GGUF file that is no importance matrix", hint)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    squares, counts = {}, {}
    for name in tensors:
        if not name.endswith(_SQUARES):
            continue
        matrix = name.removesuffix(_SQUARES)
        sums, count = _numbers(header, tensors[name]), np.zeros(0)
        if f"{matrix}{_COUNTS}" in tensors:
            count = _numbers(header, tensors[f"{matrix}{_COUNTS}"])
        sums = sums.reshape(tensors[name].shape)
        sums = sums[0] if len(sums) == 1 and sums.ndim > 1 else sums
        fitting = count.size == (len(sums) if sums.ndim > 1 else 1)
        if not fitting or not np.isfinite(sums).all() or sums.min() < 0 or not count.min() >= 0:
            raise ModelError(f"{file}: {matrix} has no usable sums and count", hint)
        tokens = tuple(round(float(number)) for number in count)
        squares[matrix], counts[matrix] = sums, tokens if sums.ndim > 1 else tokens[0]
    if not squares:
        raise ModelError(f"{file}: an importance matrix without entries", hint)
    dataset = ", ".join(header.metadata.get(_KEYS.DATASETS) or ["unknown"])
    return ImportanceMatrix(
        squares, counts, dataset, max(1, int(header.metadata.get(_KEYS.CHUNK_SIZE, 512)))
    )


def _numbers(header: GgufHeader, tensor: TensorInfo) -> npt.NDArray[np.float32]:
    if tensor.type != _F32:
        raise ModelError(
            f"{header.file}: {tensor.name} is of type {tensor.type.name}, not F32",
            "write the importance matrix again",
        )
    place = header.data_start + tensor.offset
    return np.fromfile(header.file, np.float32, tensor.num_bytes // 4, offset=place)
