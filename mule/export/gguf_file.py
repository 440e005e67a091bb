"""One GGUF file: its header, then the blocks of its tensors, read back before the file counts."""

from __future__ import annotations

import math
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mule import fsio, progress
from mule.errors import ModelError
from mule.export.families import Part
from mule.export.mixtures import num_bytes
from mule.export.quantize import FileTensor, Quantizer, Sums
from mule.generate.gguf_header import GgufHeader, read_header
from mule.generate.weight_rows import WeightRows

HEADER_BYTES = 64 * 2**20  # room for the vocabulary when asking for space on the disk
_TOKENS = "tokenizer.ggml.tokens"

Rows = tuple[WeightRows, ...] | npt.NDArray[np.float32]
Importance = Mapping[str, npt.NDArray[np.float32]]  # as of FileTensor, by the name in the file


@dataclass(frozen=True)
class GgufReport:
    """What was written. `fallbacks` names each tensor whose row length forced another type.

    `exact_context`: up to so many tokens llama.cpp computes what the model does.
    """

    file: str
    type: str
    architecture: str
    pre_tokenizer: str
    exact_context: int
    size_bytes: int
    num_params: int
    bits_per_weight: float
    tensor_types: dict[str, int]
    fallbacks: list[str]
    notes: list[str]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write, of `parts` of the folder's weights; of none if it is computed."""

    parts: tuple[Part, ...]
    name: str
    shape: tuple[int, ...]
    wanted: GGMLQuantizationType
    type: GGMLQuantizationType

    @property
    def source(self) -> str:
        """The name in the folder of the first weight that it takes; "" for none."""
        return self.parts[0].source if self.parts else ""

    @property
    def fallback(self) -> str:
        """What is said where the row length forced another type than the wanted one."""
        if self.type == self.wanted:
            return ""
        return f"{self.name}: rows of {self.shape[-1]}, {self.wanted.name} -> {self.type.name}"


@dataclass(frozen=True)
class GgufContent:
    """What goes into a file.

    `head` writes all that comes before the blocks; the `rows` of the planned tensors, by name.
    """

    head: Callable[[Path], None]
    alignment: int
    plan: Sequence[PlannedTensor]
    rows: Mapping[str, Rows]
    num_tokens: int
    importance: Importance

    @property
    def num_weights(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.plan)

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes(tensor.shape, tensor.type) for tensor in self.plan)


def write_file(file: Path, content: GgufContent, quantizer: Quantizer, label: str) -> GgufHeader:
    """Write `file`, tensor by tensor, and read it back: its header. `label` is the text of the bar.

    Raises ModelError for values that cannot be written, StorageError for the disk.
    """
    fsio.require_space(file.parent, content.num_bytes + HEADER_BYTES, "the GGUF file")
    quantizer.require(tensor.type for tensor in content.plan)
    sums: dict[str, Sums] = {}
    found: list[GgufHeader] = []

    def check(written: Path) -> None:
        found.append(_checked(written, content, sums))

    with fsio.stream_file(file, check) as temporary:
        tensors = _place(temporary, content)
        with progress.task(label, total=content.num_weights, unit="weights") as bar:
            sums |= quantizer.write(temporary, tensors, _counting(bar))
    return found[0]


def _place(file: Path, content: GgufContent) -> list[FileTensor]:
    """Write the header; the file has its full length afterwards, and every tensor its place."""
    content.head(file)
    place = _padded(file.stat().st_size, content.alignment)
    tensors = []
    for tensor in content.plan:
        tensors.append(
            FileTensor(
                name=tensor.name,
                called=tensor.source or tensor.name,
                rows=content.rows[tensor.name],
                type=tensor.type,
                offset=place,
                importance=content.importance.get(tensor.name),
            )
        )
        place += _padded(num_bytes(tensor.shape, tensor.type), content.alignment)
    os.truncate(file, place)
    return tensors


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def write_head(file: Path, writer: GGUFWriter, plan: Sequence[PlannedTensor]) -> None:
    """The header with the entries of `writer` and the tensors to come."""
    for tensor in plan:
        # The type given as float32 keeps the shape in weights; raw_dtype is what is stored.
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            num_bytes(tensor.shape, tensor.type),
            raw_dtype=tensor.type,
        )
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _counting(bar: progress.Task) -> Callable[[int], None]:
    """Moves the bar by so many weights, and tells how many a second they are."""
    start, total = time.monotonic(), 0

    def count(num_weights: int) -> None:
        nonlocal total
        total += num_weights
        bar.advance(num_weights, weights_per_second=total / max(time.monotonic() - start, 1e-9))

    return count


def _checked(file: Path, content: GgufContent, sums: Mapping[str, Sums]) -> GgufHeader:
    """The header of the file, read back with all the blocks; ModelError where they differ."""
    header = read_header(file)
    stored = {tensor.name: tensor for tensor in header.tensors}
    for tensor in content.plan:
        found = stored.get(tensor.name)
        if (
            found is None
            or (found.type, found.shape) != (tensor.type, tensor.shape)
            or not _is_as_written(file, header.data_start + found.offset, sums[tensor.name])
        ):
            raise ModelError(
                f"{file}: {tensor.name} was not read back as it was written",
                "the disk may be failing; check it and export again",
            )
    num_tokens = len(header.metadata.get(_TOKENS, []))
    if len(stored) != len(content.plan) or num_tokens != content.num_tokens:
        raise ModelError(
            f"{file}: was not read back as it was written", "check the disk and export again"
        )
    return header


def _is_as_written(file: Path, place: int, sums: Sums) -> bool:
    with open(file, "rb") as content:
        content.seek(place)
        return all(zlib.crc32(content.read(size)) == crc for size, crc in sums)


# ---------------------------------------------------------------- the report


def report(
    header: GgufHeader,
    file: Path,
    type_name: str,
    plan: Sequence[PlannedTensor],
    *,
    exact_context: int,
    notes: Sequence[str],
    start: float,
) -> GgufReport:
    """What is said of a file with this header, begun at `start`; the notes are told at once."""
    fallbacks = [tensor.fallback for tensor in plan if tensor.fallback]
    notes = [*notes, cost_of_fallbacks(plan)] if fallbacks else list(notes)
    for line in notes:
        progress.note(line, "warning")
    return GgufReport(
        file=str(file),
        type=type_name,
        architecture=header.metadata["general.architecture"],
        pre_tokenizer=header.metadata["tokenizer.ggml.pre"],
        exact_context=exact_context,
        size_bytes=header.size_bytes,
        num_params=header.num_params,
        bits_per_weight=round(header.bits_per_weight, 3),
        tensor_types=dict(Counter(tensor.type.name for tensor in plan)),
        fallbacks=fallbacks,
        notes=notes,
        seconds=round(time.monotonic() - start, 2),
    )


def how_made(quantizer: Quantizer) -> list[str]:
    """Notes on blocks that are not llama.cpp's own."""
    notes = []
    if quantizer.native is False:
        notes.append(f"blocks made by NumPy, not by llama.cpp: {quantizer.reason}")
    if quantizer.unweighed:
        notes.append(
            f"the importance matrix has no effect on {len(quantizer.unweighed)} tensors, such as "
            f"{quantizer.unweighed[0]}: NumPy makes their types without it"
        )
    return notes


def cost_of_fallbacks(plan: Sequence[PlannedTensor]) -> str:
    """Which types gave way because a row does not divide into blocks, and what that adds."""
    changed = [tensor for tensor in plan if tensor.type != tensor.wanted]
    ways = Counter(f"{t.wanted.name} -> {t.type.name}" for t in changed)
    shown = ", ".join(f"{way} in {count}" for way, count in ways.most_common())
    rows = ", ".join(str(length) for length in sorted({t.shape[-1] for t in changed}))
    size = sum(num_bytes(t.shape, t.type) for t in plan)
    wanted = sum(math.prod(t.shape) * _bits(t.wanted) for t in plan) / 8
    return (
        f"{len(changed)} of {len(plan)} tensors have rows ({rows}) that do not divide into blocks, "
        f"and take larger types: {shown}; {size / 1e6:,.1f} MB of weights "
        f"where whole blocks would take {wanted / 1e6:,.1f}"
    )


def _bits(kind: GGMLQuantizationType) -> float:
    """Bits a weight in blocks of `kind`."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return 8 * block_bytes / block
