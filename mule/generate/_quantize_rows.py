"""Rows of weights read, quantised and put into a file, by threads of the child process.

Reading here keeps the weights out of the pipe, and small slices keep them in the processor's cache.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mule.generate._libllama import num_cores, quantize_rows
from mule.generate.weight_rows import NotFiniteError, WeightRows

_SLICE_WEIGHTS = 2**17  # of a slice: half a MB in float32, a few ms of work


@dataclass(frozen=True)
class _Slice:
    """Rows `first` to `last` of a tensor, whose blocks go to byte `offset` of the file."""

    name: str
    rows: WeightRows
    type_id: int
    row_bytes: int
    first: int
    last: int
    offset: int
    importance: npt.NDArray[np.float32] | None

    def write(self, library: ctypes.CDLL, descriptor: int) -> list[int]:
        """The number of bytes that were written, and their CRC-32."""
        try:
            values = self.rows.values(self.first, self.last)
        except NotFiniteError:
            raise NotFiniteError(self.name) from None
        out = np.empty((len(values), self.row_bytes), np.uint8)
        quantize_rows(library, self.type_id, values, out, self.importance)
        data = out.data.cast("B")
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], self.offset + written)
        return [len(data), zlib.crc32(data)]


def quantize_values(
    library: ctypes.CDLL, data: bytes, type_id: int, rows: int, columns: int, row_bytes: int
) -> memoryview:
    """The blocks of `data`: rows of float32, and before them a row of importance if there is room."""
    library.ggml_quantize_init(type_id)
    numbers = np.frombuffer(data, np.float32).reshape(-1, columns)
    importance = numbers[0] if len(numbers) > rows else None
    values = numbers[len(numbers) - rows :]
    out = np.empty((rows, row_bytes), np.uint8)
    step = max(1, _SLICE_WEIGHTS // columns)

    def quantize(start: int) -> None:
        part = slice(start, start + step)
        quantize_rows(library, type_id, values[part], out[part], importance)

    with ThreadPoolExecutor(num_cores()) as pool:
        list(pool.map(quantize, range(0, rows, step)))
    return out.data.cast("B")


def quantize_parts(
    library: ctypes.CDLL, out: str, parts: Sequence[dict[str, Any]], importance: bytes
) -> dict[str, Any]:
    """Write the blocks of `parts` into the file `out`; `sums` has (bytes, CRC-32) of every slice.

    A part names `rows` (the fields of WeightRows), `first` and `last` of them, `type_id`,
    `row_bytes`, `offset` of the first row's blocks, and `important`: whether a float32 for each of
    its columns comes next in `importance`.
    The answer is `not_finite`, a tensor's name, or `errno` where the work ended there.
    """
    slices, groups = _slices(library, parts, importance)
    try:
        with open(out, "r+b", buffering=0) as file, ThreadPoolExecutor(num_cores()) as pool:
            descriptor = file.fileno()
            sums = list(pool.map(lambda part: part.write(library, descriptor), slices))
    except NotFiniteError as error:
        return {"not_finite": str(error)}
    except OSError as error:
        return {"errno": error.errno}
    each = iter(sums)
    return {"sums": [[next(each) for _ in range(count)] for count in groups]}


def _slices(
    library: ctypes.CDLL, parts: Sequence[dict[str, Any]], importance: bytes
) -> tuple[list[_Slice], list[int]]:
    """The slices of all parts, and how many each part has."""
    weights, used = np.frombuffer(importance, np.float32), 0
    slices: list[_Slice] = []
    groups = []
    for part in parts:
        rows, type_id, row_bytes = WeightRows(**part["rows"]), part["type_id"], part["row_bytes"]
        own = None
        if part["important"]:
            own = weights[used : used + rows.num_columns]
            used += rows.num_columns
        library.ggml_quantize_init(type_id)
        step = max(1, _SLICE_WEIGHTS // rows.num_columns)
        starts = range(part["first"], part["last"], step)
        groups.append(len(starts))
        for start in starts:
            stop = min(start + step, part["last"])
            offset = part["offset"] + (start - part["first"]) * row_bytes
            slices.append(_Slice(part["name"], rows, type_id, row_bytes, start, stop, offset, own))
    return slices, groups
