"""Reading a GGUF header in Python, distrusting every number in it, before native code sees it.

Source: docs/gguf.md of ggml (version 3; version 2 differs in nothing read here).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mule.errors import ModelError

_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd"))  # type -> struct's letter
_STRING, _ARRAY = 8, 9
_SMALLEST_PAIR = 8 + 4 + 1  # an empty key, its type, one byte
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # an empty name, the number of sizes, one size, type, offset
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_NAME_BYTES = 64  # GGML_MAX_NAME
_MAX_ITEMS = 2**24  # of one array or string: no vocabulary or template comes near
_HINT = "the file is damaged or incomplete: write it again with `mule export`, or download it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file; `shape` has the row length last, as in torch."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself; every tensor lies inside the file."""

    file: Path
    size_bytes: int
    metadata: dict[str, Any]
    tensors: list[TensorInfo] = field(repr=False)

    @property
    def num_params(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(tensor.num_bytes for tensor in self.tensors) / max(1, self.num_params)


def read_header(file: Path | str) -> GgufHeader:
    """The header of a GGUF file, checked against the size of the file.

    Raises ModelError, naming the file, when it is missing, is no GGUF, is cut short, or says
    something impossible.
    """
    file = Path(file)
    if not file.is_file():
        raise ModelError(f"{file}: no such file", "give the path of a .gguf file")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        reader = _Reader(file, stream, size)
        if reader.take(4) != b"GGUF":
            raise ModelError(f"{file}: not a GGUF file (its first bytes are not 'GGUF')", _HINT)
        if (version := reader.number("I")) not in (2, 3):
            raise ModelError(f"{file}: GGUF version {version}; 2 and 3 are known", _HINT)
        num_tensors, num_pairs = reader.number("Q"), reader.number("Q")
        reader.room(num_pairs, _SMALLEST_PAIR, "metadata entries")
        metadata = dict(reader.pair() for _ in range(num_pairs))
        reader.room(num_tensors, _SMALLEST_TENSOR, "tensors")
        tensors = [reader.tensor() for _ in range(num_tensors)]
        _check_tensors(reader, tensors, metadata.get("general.alignment", 32))
    return GgufHeader(file, size, metadata, tensors)


def _check_tensors(reader: _Reader, tensors: list[TensorInfo], alignment: Any) -> None:
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise reader.refuse(f"alignment {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    names = set()
    for tensor in tensors:
        if tensor.name in names:
            raise reader.refuse(f"tensor {tensor.name!r} is there twice")
        names.add(tensor.name)
        if tensor.offset % alignment:
            raise reader.refuse(f"tensor {tensor.name!r} starts at an unaligned place")
        if start + tensor.offset + tensor.num_bytes > reader.size:
            raise ModelError(
                f"{reader.file}: cut short: tensor {tensor.name!r} ends at byte "
                f"{start + tensor.offset + tensor.num_bytes:,} of a file of {reader.size:,} bytes",
                _HINT,
            )


class _Reader:
    """Takes values off an open file, never more than it holds."""

    def __init__(self, file: Path, stream: Any, size: int) -> None:
        self.file, self.size, self.position = file, size, 0
        self._stream = stream

    def refuse(self, what: str) -> ModelError:
        return ModelError(f"{self.file}: not a usable GGUF file: {what}", _HINT)

    def room(self, count: int, smallest: int, what: str) -> None:
        if count * smallest > self.size - self.position:
            raise self.refuse(
                f"it announces {count:,} {what} but has {self.size - self.position:,} bytes left"
            )

    def take(self, num_bytes: int) -> bytes:
        self.room(num_bytes, 1, "bytes")
        self.position += num_bytes
        return self._stream.read(num_bytes)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self.take(self.count()).decode("utf-8", "replace")

    def count(self) -> int:
        if (count := self.number("Q")) > _MAX_ITEMS:
            raise self.refuse(f"an array or string of {count:,} items")
        return count

    def pair(self) -> tuple[str, Any]:
        key = self.string()
        return key, self.value(self.number("I"))

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.refuse(f"unknown value type {kind}")
        kind, count = self.number("I"), self.count()
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            self.room(count, struct.calcsize(f"<{_SCALARS[kind]}"), "array items")
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        if kind != _STRING:
            raise self.refuse(f"an array of value type {kind}")
        self.room(count, 8, "strings")
        return [self.string() for _ in range(count)]

    def tensor(self) -> TensorInfo:
        name = self.string()
        if len(name.encode()) >= _MAX_NAME_BYTES:
            raise self.refuse(f"a tensor name of {len(name)} characters")
        if not 1 <= (num_dimensions := self.number("I")) <= _MAX_DIMENSIONS:
            raise self.refuse(f"tensor {name!r} has {num_dimensions} dimensions")
        sizes = [self.number("Q") for _ in range(num_dimensions)]
        kind, offset = self.number("I"), self.number("Q")
        if kind not in GGMLQuantizationType._value2member_map_:
            raise self.refuse(f"tensor {name!r} has the unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if 0 in sizes or sizes[0] % block:
            raise self.refuse(f"tensor {name!r} of shape {sizes} cannot be of its type")
        num_bytes = math.prod(sizes) // block * block_bytes
        return TensorInfo(
            name, tuple(reversed(sizes)), GGMLQuantizationType(kind), offset, num_bytes
        )
