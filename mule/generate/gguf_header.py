"""Reading a GGUF header in Python, distrusting every number in it, before native code sees it.

Source: docs/gguf.md of ggml (version 3; version 2 differs in nothing read here), and what llama.cpp
b11549 trusts without a look: lengths of lists that belong together, and token ids.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, TokenType

from mule.errors import ModelError
from mule.tokenizer.template import MAX_TEMPLATE_BYTES

_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd"))  # type -> struct's letter
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SMALLEST_PAIR = 8 + 4 + 1  # an empty key, its type, one byte
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # an empty name, the number of sizes, one size, type, offset
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_NAME_BYTES = 64  # GGML_MAX_NAME
_MAX_ITEMS = 2**24  # of one array or string: no vocabulary or template comes near
_MAX_HEADER_BYTES = 2**28  # the largest vocabularies take 20 MB
_MAX_PAIRS, _MAX_TENSORS = 2**16, 2**17
_ALIGNMENT = "general.alignment"
_TEMPLATE = "tokenizer.chat_template"  # and named ones, behind a dot
_TOKENS = "tokenizer.ggml.tokens"
_BESIDE_TOKENS = ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")
# Others (padding, unknown) lie outside the vocabulary in some well-known files, and are not used.
_ENDS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("bos", "eos", "eot", "eom"))
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
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
    data_start: int  # the byte of the file that the tensors' offsets count from
    places: dict[str, tuple[int, int]] = field(repr=False)  # bytes of each metadata entry

    @property
    def num_params(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(tensor.num_bytes for tensor in self.tensors) / max(1, self.num_params)


def read_header(file: Path | str) -> GgufHeader:
    """The header of a GGUF file, checked against the size of the file and against itself.

    Raises ModelError, naming the file, when it is missing, is no GGUF, is cut short, or says
    something impossible: counts beyond the file, a key or a tensor twice, tensors that overlap or
    leave gaps, tokens that do not exist, a chat template beyond Mule's limit.
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
        reader.room(num_pairs, _SMALLEST_PAIR, "metadata entries", _MAX_PAIRS)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            reader.pair(metadata)
        reader.room(num_tensors, _SMALLEST_TENSOR, "tensors", _MAX_TENSORS)
        tensors = [reader.tensor() for _ in range(num_tensors)]
        start = _check_tensors(reader, tensors, metadata.get(_ALIGNMENT, 32))
        _check_vocabulary(reader, metadata)
    return GgufHeader(file, size, metadata, tensors, start, reader.places)


def _check_tensors(reader: _Reader, tensors: list[TensorInfo], alignment: int) -> int:
    """Every tensor begins where the one before ends, aligned: llama.cpp reads no other order.

    Returns the byte of the file where the first one begins.
    """
    if alignment < 8 or alignment & (alignment - 1):
        raise reader.refuse(f"alignment {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    names, place = set(), 0
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
        if tensor.offset != place:
            how = "overlaps" if tensor.offset < place else "leaves a gap behind"
            raise reader.refuse(f"tensor {tensor.name!r} {how} the one before it")
        place += -(-tensor.num_bytes // alignment) * alignment
    return start


def _check_vocabulary(reader: _Reader, metadata: dict[str, Any]) -> None:
    """What native code takes for granted of the tokens, their types and the chat template."""
    for key, value in metadata.items():
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            if not isinstance(value, str):
                raise reader.refuse(f"{key} is not a text")
            if (num_bytes := len(value.encode())) > MAX_TEMPLATE_BYTES:
                most = f"at most {MAX_TEMPLATE_BYTES:,} are read"
                raise reader.refuse(f"a chat template of {num_bytes:,} bytes; {most}")
    tokens = metadata.get(_TOKENS, [])
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise reader.refuse(f"{_TOKENS} is not a list of texts")
    for key in _BESIDE_TOKENS:
        beside = metadata.get(key, tokens)
        if not isinstance(beside, list) or len(beside) != len(tokens):
            raise reader.refuse(
                f"{key} is not a list with one entry for each of {len(tokens):,} tokens"
            )
    for key in _ENDS:
        token = metadata.get(key)
        if tokens and token is not None and not (type(token) is int and 0 <= token < len(tokens)):
            raise reader.refuse(f"{key} is {token!r}, and there are {len(tokens):,} tokens")
    kinds = metadata.get(_BESIDE_TOKENS[0], [])
    for index, token in enumerate(tokens):
        is_byte = bool(kinds) and kinds[index] == TokenType.BYTE
        looks_like_one = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        if (is_byte or looks_like_one) and not _BYTE_TOKEN.fullmatch(token):
            raise reader.refuse(f"token {index} is {token[:20]!r}, which is no byte from <0x00> on")


class _Reader:
    """Takes values off an open file, never more than it holds."""

    def __init__(self, file: Path, stream: Any, size: int) -> None:
        self.file, self.size, self.position = file, size, 0
        self._stream = stream
        self.places: dict[str, tuple[int, int]] = {}  # of the entries, from start to stop

    def refuse(self, what: str) -> ModelError:
        return ModelError(f"{self.file}: not a usable GGUF file: {what}", _HINT)

    def room(self, count: int, smallest: int, what: str, most: int | None = None) -> None:
        if count * smallest > self.size - self.position:
            raise self.refuse(
                f"it announces {count:,} {what} but has {self.size - self.position:,} bytes left"
            )
        if most is not None and count > most:
            raise self.refuse(f"it announces {count:,} {what}; more than {most:,} are not read")

    def take(self, num_bytes: int) -> bytes:
        self.room(num_bytes, 1, "bytes")
        self.position += num_bytes
        if self.position > _MAX_HEADER_BYTES:
            raise self.refuse(f"its header goes on beyond {_MAX_HEADER_BYTES:,} bytes")
        return self._stream.read(num_bytes)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self.take(self.count()).decode("utf-8", "replace")

    def strings(self, count: int) -> list[str]:
        """As many times `string`, in one loop: vocabularies have hundreds of thousands."""
        texts, end = [], min(self.size, _MAX_HEADER_BYTES)
        for _ in range(count):
            head = self._stream.read(8)
            length = int.from_bytes(head, "little")
            if length > _MAX_ITEMS or self.position + 8 + length > end:
                self._stream.seek(-len(head), os.SEEK_CUR)
                texts.append(self.string())  # says what is wrong
                continue
            self.position += 8 + length
            texts.append(self._stream.read(length).decode("utf-8", "replace"))
        return texts

    def count(self) -> int:
        if (count := self.number("Q")) > _MAX_ITEMS:
            raise self.refuse(f"an array or string of {count:,} items")
        return count

    def pair(self, metadata: dict[str, Any]) -> None:
        """Read one entry into `metadata`."""
        start, key = self.position, self.string()
        if key in metadata:
            raise self.refuse(f"the key {key[:_MAX_NAME_BYTES]!r} is there twice")
        kind = self.number("I")
        if key == _ALIGNMENT and kind != _UINT32:
            raise self.refuse(f"{key} is of value type {kind}, not a whole number of 32 bits")
        metadata[key] = self.value(kind)
        self.places[key] = start, self.position

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
        if kind == _ARRAY:
            raise self.refuse("an array of arrays, which llama.cpp does not read")
        if kind != _STRING:
            raise self.refuse(f"an array of value type {kind}")
        self.room(count, 8, "strings")
        return self.strings(count)

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
        if math.prod(sizes) >= 2**63:
            raise self.refuse(
                f"tensor {name!r} of shape {sizes} has more numbers than 63 bits count"
            )
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if 0 in sizes or sizes[0] % block:
            raise self.refuse(f"tensor {name!r} of shape {sizes} cannot be of its type")
        num_bytes = math.prod(sizes) // block * block_bytes
        return TensorInfo(
            name, tuple(reversed(sizes)), GGMLQuantizationType(kind), offset, num_bytes
        )
