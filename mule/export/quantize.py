"""The blocks of each type, put into a file.

They come from llama.cpp's own code in a child process, so a file is byte for byte what
llama-quantize writes; where that runtime is absent, NumPy makes them (kquants.py).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize as quantize_simple

from mule.errors import ModelError
from mule.export.kquants import KQUANTS
from mule.export.mixtures import num_bytes
from mule.generate.llamacpp import Runtime
from mule.generate.weight_rows import NotFiniteError, WeightRows

_T = GGMLQuantizationType
# Made by llama.cpp alone; of the others there is NumPy code too.
_ONLY_NATIVE = frozenset({_T.Q2_K, _T.Q3_K, _T.IQ4_XS, _T.IQ4_NL})
_NATIVE = _ONLY_NATIVE | {_T.Q4_K, _T.Q5_K, _T.Q6_K, _T.Q4_0, _T.Q5_0, _T.Q5_1, _T.Q8_0, _T.MXFP4}
# Of these the importance of columns changes the blocks; `simple` ones only as llama.cpp makes them.
_SIMPLE_WEIGHED = frozenset({_T.Q4_0, _T.Q5_0, _T.Q5_1})
_WEIGHED = _ONLY_NATIVE | {_T.Q4_K, _T.Q5_K, _T.Q6_K} | _SIMPLE_WEIGHED
_SLICE_WEIGHTS = 2**20  # in memory at a time, where this process makes the blocks
_REQUEST_WEIGHTS = 2**24  # given to the child at a time: about a second of work
_F16_MAX = 65504.0

Sums = list[tuple[int, int]]  # (number of bytes, their CRC-32), one after the other


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor and its place: blocks of `type` from byte `offset` of the file on.

    `called` is its name in errors. `rows` is where its numbers come from, one matrix after another,
    or they themselves. `importance` float32: the mean square of what each column is multiplied with,
    (columns) for all rows, or (matrices, columns) for those of each matrix.
    """

    name: str
    called: str
    rows: tuple[WeightRows, ...] | npt.NDArray[np.float32]
    type: GGMLQuantizationType
    offset: int
    importance: npt.NDArray[np.float32] | None = None

    def importance_of(self, matrix: int) -> npt.NDArray[np.float32] | None:
        """What counts for one of the matrices."""
        if self.importance is None or self.importance.ndim == 1:
            return self.importance
        return self.importance[matrix]


class Quantizer:
    """Writes tensors as blocks of a type; starts its child when first needed.

    `native` is None until then; afterwards it says whether llama.cpp made the blocks, and
    `reason` why not. `unweighed` names tensors whose importance NumPy could not use.
    """

    def __init__(self, *, native: bool | None = None) -> None:
        self.native = native
        self.reason = "" if native is not False else "asked for"
        self.unweighed: list[str] = []
        self._runtime: Runtime | None = None

    def require(self, kinds: Iterable[GGMLQuantizationType]) -> None:
        """Raises ModelError when one of `kinds` can be made by llama.cpp only, and it is absent."""
        needed = sorted(_ONLY_NATIVE & set(kinds))
        if needed and not self._start():
            raise ModelError(
                f"only llama.cpp makes blocks of {', '.join(kind.name for kind in needed)}, "
                f"and it cannot run here: {self.reason}",
                "pip install xllamacpp, or export another type: --types q4_k_m",
            )

    def encode(
        self,
        name: str,
        values: npt.NDArray,
        kind: GGMLQuantizationType,
        importance: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray:
        """`values` as (rows, bytes a row) uint8, or as float32/float16 for these two types.

        Raises ModelError, naming the tensor, for NaN, infinity or what float16 cannot hold.
        """
        values = np.ascontiguousarray(values, np.float32)
        if kind not in _NATIVE or not self._start():
            shape = values.shape if kind in (_T.F32, _T.F16) else (-1, values.shape[-1])
            return encode(name, values.reshape(shape), kind, importance)
        if not np.isfinite(values).all():
            raise _not_finite(name)
        assert self._runtime is not None
        rows = values.reshape(-1, values.shape[-1])
        row_bytes = num_bytes(rows.shape[1:], kind)
        weights = [importance] if importance is not None and kind in _WEIGHED else []
        _, data = self._runtime.request(
            "quantize",
            np.concatenate([*weights, rows.reshape(-1)]).data.cast("B"),
            type_id=int(kind),
            rows=len(rows),
            columns=rows.shape[1],
            row_bytes=row_bytes,
        )
        return np.frombuffer(data, np.uint8).reshape(-1, row_bytes)

    def write(
        self, file: Path, tensors: Sequence[FileTensor], done: Callable[[int], None]
    ) -> dict[str, Sums]:
        """Put the blocks of `tensors` into an existing file; `done` is told of weights as they go.

        The sums are those of every tensor's bytes, by name. Raises ModelError, naming the tensor,
        for NaN, infinity or what float16 cannot hold; OSError for the disk.
        """
        sums: dict[str, Sums] = {tensor.name: [] for tensor in tensors}
        native = [t for t in tensors if t.type in _NATIVE and self._start()]
        taken = {tensor.name for tensor in native}
        with open(file, "r+b", buffering=0) as out:
            for tensor in tensors:
                if tensor.name in taken:
                    continue
                out.seek(tensor.offset)
                block, block_bytes = GGML_QUANT_SIZES[tensor.type]
                for part in self._encoded(tensor):
                    data = part.data.cast("B")
                    _write_all(out, data)
                    sums[tensor.name].append((len(data), zlib.crc32(data)))
                    done(len(data) // block_bytes * block)
        for batch in _batches(native):
            for part, found in zip(batch, self._write_native(file, batch)):
                sums[part.tensor.name] += found
            done(sum(part.num_weights for part in batch))
        return sums

    def _encoded(self, tensor: FileTensor) -> Iterator[npt.NDArray]:
        """The parts of a tensor, one after the other, as this process makes their bytes."""
        rows = tensor.rows
        if tensor.importance is not None and tensor.type in _SIMPLE_WEIGHED:
            self.unweighed.append(tensor.name)
        if isinstance(rows, np.ndarray):
            yield np.ascontiguousarray(encode(tensor.called, rows, tensor.type))
            return
        for number, matrix in enumerate(rows):
            yield from _encoded_matrix(tensor, number, matrix)

    def _write_native(self, file: Path, batch: Sequence[_Part]) -> list[Sums]:
        assert self._runtime is not None
        weights = [p.importance for p in batch if p.importance is not None]
        answer, _ = self._runtime.request(
            "quantize_file",
            np.concatenate(weights).data.cast("B") if weights else b"",
            out=str(file),
            parts=[part.request() for part in batch],
        )
        if "not_finite" in answer:
            raise _not_finite(answer["not_finite"])
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return [[(size, crc) for size, crc in part] for part in answer["sums"]]

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None


# ---------------------------------------------------------------- for the child


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows `first` to `last` of one matrix of a tensor, which has `before` rows ahead of it."""

    tensor: FileTensor
    matrix: int
    rows: WeightRows
    before: int
    first: int
    last: int

    @property
    def num_weights(self) -> int:
        return (self.last - self.first) * self.rows.num_columns

    @property
    def importance(self) -> npt.NDArray[np.float32] | None:
        return self.tensor.importance_of(self.matrix) if self.tensor.type in _WEIGHED else None

    def request(self) -> dict[str, Any]:
        row_bytes = num_bytes((self.rows.num_columns,), self.tensor.type)
        return {
            "name": self.tensor.called,
            "rows": asdict(self.rows),
            "first": self.first,
            "last": self.last,
            "type_id": int(self.tensor.type),
            "row_bytes": row_bytes,
            "offset": self.tensor.offset + (self.before + self.first) * row_bytes,
            "important": self.importance is not None,
        }


def _batches(tensors: Iterable[FileTensor]) -> Iterator[list[_Part]]:
    """The tensors in parts, gathered to requests of a bounded number of weights."""
    batch: list[_Part] = []
    size = 0
    for tensor in tensors:
        assert isinstance(tensor.rows, tuple), tensor.name
        before = 0
        for matrix, rows in enumerate(tensor.rows):
            step = max(1, _REQUEST_WEIGHTS // rows.num_columns)
            for first in range(0, rows.num_rows, step):
                last = min(first + step, rows.num_rows)
                batch.append(_Part(tensor, matrix, rows, before, first, last))
                size += batch[-1].num_weights
                if size >= _REQUEST_WEIGHTS:
                    yield batch
                    batch, size = [], 0
            before += rows.num_rows
    if batch:
        yield batch


# ---------------------------------------------------------------- by NumPy


def encode(
    name: str,
    values: npt.NDArray,
    kind: GGMLQuantizationType,
    importance: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray:
    """`values` in float32 as bytes of `kind`, made by NumPy; float32 and float16 as such.

    Raises ModelError, naming the tensor, for NaN, infinity or what float16 cannot hold.
    """
    if not np.isfinite(values).all():
        raise _not_finite(name)
    if kind == _T.F32:
        return values
    if kind == _T.F16:
        return _to_f16(name, values)
    if kind in KQUANTS:
        return KQUANTS[kind](values, importance)
    return quantize_simple(values, kind)


def _encoded_matrix(tensor: FileTensor, number: int, rows: WeightRows) -> Iterator[npt.NDArray]:
    copied = rows.dtype == tensor.type.name and rows.as_stored
    step = max(1, _SLICE_WEIGHTS // rows.num_columns)
    for first in range(0, rows.num_rows, step):
        last = min(first + step, rows.num_rows)
        try:
            part = rows.stored(first, last) if copied else rows.values(first, last)
        except NotFiniteError:
            raise _not_finite(tensor.called) from None
        if not copied:
            part = encode(tensor.called, part, tensor.type, tensor.importance_of(number))
        yield np.ascontiguousarray(part)


def takes_importance(kind: GGMLQuantizationType) -> bool:
    """Whether the importance of columns changes blocks of `kind`."""
    return kind in _WEIGHED


def _to_f16(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    largest = float(np.abs(values).max(initial=0.0))
    if largest > _F16_MAX:
        raise ModelError(
            f"{name} holds {largest:.4g}; float16 ends at {_F16_MAX:.0f}",
            "export with --type bf16, which has the range of float32",
        )
    return values.astype(np.float16)


def _not_finite(name: str) -> ModelError:
    return ModelError(f"{name} holds NaN or infinite values", "export an earlier checkpoint")


def _write_all(out: Any, data: memoryview) -> None:
    """Write all of it: a raw file may take a part."""
    written = 0
    while written < len(data):
        written += out.write(data[written:])
