"""The safetensors format, tensor by tensor: what a file holds, its bytes, and writing one in a stream.

A file is a header's length (8 bytes, little-endian), the header (JSON), and the bytes of the tensors
without gaps. A header is read here, in Python and distrusted, before native code sees the file.
Source: github.com/huggingface/safetensors, "Format", and `validate` in its tensor.rs.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mule.errors import ModelError

DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
_CHUNK_BYTES = 1 << 22
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_MAX_DIMENSIONS = 64  # torch's
_ENTRY = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
_SHOWN_CHARS = 80  # of what a file says of itself


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; its bytes are those from `start` to `stop` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def open_tensors(file: Path, hint: str = "download or export it again") -> Any:
    """An open safetensors file, whose tensors are read when asked for; its header was checked first.

    Raises ModelError, naming the file and what is wrong with it.
    """
    stored_tensors(file, hint)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error, hint) from None


def stored_tensors(file: Path, hint: str = "download or export it again") -> list[StoredTensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises ModelError for one that is cut off or too long, or whose header names a tensor twice, an
    unknown type, or places outside the file, overlapping or with gaps.
    """
    try:
        return _checked(file)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error, hint) from None


def _unreadable(file: Path, error: Exception, hint: str) -> ModelError:
    what = "its header is nested too deep" if isinstance(error, RecursionError) else f"{error}"
    return ModelError(f"{file}: not a readable safetensors file ({what})", hint)


def _checked(file: Path) -> list[StoredTensor]:
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size < 8:
            raise ValueError(f"it has {size} bytes, and its first number alone takes 8")
        length = int.from_bytes(opened.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(
                f"it announces a header of {length:,} bytes; more than {_MAX_HEADER_BYTES:,} are "
                "not read"
            )
        if length > size - 8:
            raise ValueError(
                f"its header is longer than the file: {length:,} bytes where {size - 8:,} are left"
            )
        header = json.loads(opened.read(length), object_pairs_hook=_without_twins)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"its {_METADATA} is not an object of texts")
    found = [_entry(name, entry, 8 + length) for name, entry in header.items()]
    found.sort(key=lambda tensor: (tensor.start, tensor.stop, tensor.name))
    _check_places(found, 8 + length, size)
    return found


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{_shown(twice)} is there twice")
    return found


def _check_places(tensors: list[StoredTensor], start: int, size: int) -> None:
    """Each tensor begins where the one before ends, and the last one ends with the file."""
    place, before = start, "the header"
    for tensor in tensors:
        if tensor.start != place:
            how = "overlaps" if tensor.start < place else "leaves a gap behind"
            raise ValueError(f"{_shown(tensor.name)} {how} {before}")
        place, before = tensor.stop, _shown(tensor.name)
    if place > size:
        raise ValueError(f"it is cut off: {before} ends at byte {place:,} of {size:,}")
    if place < size:
        raise ValueError(f"it has {size - place:,} bytes that belong to no tensor")


def _entry(name: str, entry: Any, data_start: int) -> StoredTensor:
    shown = _shown(name)
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise ValueError(f"{shown} has not just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{shown} has the unknown type {_brief(dtype)}")
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{shown} has the shape {_brief(shape)}")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown} has the offsets {_brief(offsets)}")
    start, stop = offsets
    tensor = StoredTensor(name, dtype, tuple(shape), data_start + start, data_start + stop)
    if stop - start != tensor.num_bytes:
        raise ValueError(f"{shown} has another size than its shape")
    return tensor


def _counts(values: Any) -> bool:
    """Whether this is a list of numbers from 0 that fit into 63 bits."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _brief(value: Any) -> str:
    return _shown(f"{value[:8] if isinstance(value, list) else value}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}...")


def read_chunks(descriptor: int, tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a tensor of an open file, a few MB at a time; several threads may read."""
    place = tensor.start
    while place < tensor.stop:
        chunk = os.pread(descriptor, min(_CHUNK_BYTES, tensor.stop - place), place)
        if not chunk:
            raise OSError(f"{tensor.name} is cut off")
        place += len(chunk)
        yield chunk


def write_tensor_file(
    file: Path,
    tensors: Sequence[StoredTensor],
    chunks: Callable[[StoredTensor], Iterable[bytes | memoryview]],
) -> None:
    """Write `tensors` in this order, each from its `chunks`: one tensor in memory at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        offsets = [place, place + tensor.num_bytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        place = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            before = out.tell()
            for chunk in chunks(tensor):
                out.write(chunk)
            assert out.tell() - before == tensor.num_bytes, tensor.name
