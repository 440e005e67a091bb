"""Further types of a model made from a GGUF file that is not quantised: its kept master.

The entries are copied as they are, but for the type: the file is byte for byte what an export from
the folder in the master's precision gives.
"""

from __future__ import annotations

import contextlib
import math
import struct
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gguf.constants import (
    GGML_QUANT_VERSION,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGUF_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFValueType,
    Keys,
)

from mule.errors import ModelError
from mule.export.families import FAMILIES
from mule.export.gguf import require_type
from mule.export.gguf_file import (
    GgufContent,
    GgufReport,
    PlannedTensor,
    how_made,
    report,
    write_file,
)
from mule.export.imatrix_file import ImportanceMatrix
from mule.export.mixtures import TYPES, Mixture, num_bytes
from mule.export.quantize import Quantizer
from mule.generate.gguf_header import GgufHeader, read_header
from mule.generate.weight_rows import WeightRows

_T = GGMLQuantizationType
_FULL = {"f32": _T.F32, "f16": _T.F16, "bf16": _T.BF16}
_FILE_TYPE, _VERSION = Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION
_QUANTIZE = "quantize."  # keys that say how a file was quantised
_TOKENS = "tokenizer.ggml.tokens"


def read_master(file: Path) -> GgufHeader:
    """The header of a GGUF file that others can be made from.

    Raises ModelError for a quantised one, an adapter or matrix, and an unknown architecture.
    """
    header = read_header(file)
    kind = header.metadata.get(Keys.General.TYPE, GGUFType.MODEL)
    if kind != GGUFType.MODEL:
        raise ModelError(f"{file}: a GGUF file of type {kind!r}, not a model", "name the model")
    if quantised := [t for t in header.tensors if t.type not in _FULL.values()]:
        raise ModelError(
            f"{file}: {len(quantised)} of {len(header.tensors)} tensors are quantised already "
            f"({quantised[0].type.name}); what is made from a quantised file has both errors",
            "make it from the f32, f16 or bf16 file, or from the run: mule export RUN --types TYPE",
        )
    known = {MODEL_ARCH_NAMES[family.arch] for family in FAMILIES.values()}
    if (arch := header.metadata.get(Keys.General.ARCHITECTURE)) not in known:
        raise ModelError(
            f"{file}: the architecture {arch!r}; Mule knows the mixtures of "
            f"{', '.join(sorted(known))}",
            "quantise it with llama-quantize",
        )
    return header


def write_from_gguf(
    master: Path | str,
    out_file: Path | str,
    type_name: str,
    *,
    importance: ImportanceMatrix | None = None,
    quantizer: Quantizer | None = None,
    exact_context: int | None = None,
) -> GgufReport:
    """Write the model of the file `master`, which is not quantised, as `type_name`.

    `exact_context` is what the report says; by default the file's own context.
    Raises ModelError for a master that others cannot be made from, and as `write_gguf`.
    """
    start = time.monotonic()
    master, out_file = Path(master), Path(out_file)
    require_type(type_name)
    header = read_master(master)
    _require_step_down(header, type_name)
    plan = _plan(header, type_name, weighed=importance is not None)
    entries = _entries(header, type_name)
    columns = {}
    if importance is not None:
        importance.check({tensor.name: tensor.shape for tensor in plan})
        columns = importance.columns()
        entries += [_pair(key, value) for key, value in importance.entries().items()]
    rows = {tensor.name: _rows(header, place) for place, tensor in enumerate(header.tensors)}
    num_tokens = len(header.metadata.get(_TOKENS, []))
    alignment = header.metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
    head = partial(_write_head, entries=entries, plan=plan, alignment=alignment)
    content = GgufContent(head, alignment, plan, rows, num_tokens, columns)
    with contextlib.ExitStack() as stack:
        quantizer = quantizer or stack.enter_context(Quantizer())
        written = write_file(out_file, content, quantizer, f"Writing {type_name}")
    context = exact_context or _context_length(header)
    notes = how_made(quantizer)
    return report(
        written, out_file, type_name, plan, exact_context=context, notes=notes, start=start
    )


def _require_step_down(header: GgufHeader, type_name: str) -> None:
    """A file of full numbers is made from float32 only: from another it would be rounded twice."""
    matrices = {tensor.type for tensor in header.tensors if len(tensor.shape) > 1}
    if type_name in _FULL and matrices != {_T.F32}:
        found = ", ".join(sorted(kind.name for kind in matrices))
        raise ModelError(
            f"{header.file}: its matrices are {found}; {type_name} made from that is no more exact",
            f"make it from the run: mule export RUN --types {type_name}",
        )


def _plan(header: GgufHeader, type_name: str, *, weighed: bool) -> list[PlannedTensor]:
    arch = header.metadata[Keys.General.ARCHITECTURE]
    layers = _count(header, Keys.LLM.BLOCK_COUNT.format(arch=arch))
    heads = _count(header, Keys.Attention.HEAD_COUNT.format(arch=arch))
    kv_heads = _kv_heads(header, Keys.Attention.HEAD_COUNT_KV.format(arch=arch), layers)
    mixture = Mixture(
        type_name,
        layers,
        all(tensor.name != "output.weight" for tensor in header.tensors),
        heads // kv_heads[0] if kv_heads[0] else 0,
        weighed,
        attending=tuple(layer for layer, count in enumerate(kv_heads) if count),
        experts=header.metadata.get(Keys.LLM.EXPERT_COUNT.format(arch=arch), 0),
    )
    return [
        PlannedTensor(
            (), tensor.name, tensor.shape, *mixture.tensor_type(tensor.name, tensor.shape)
        )
        for tensor in header.tensors
    ]


def _kv_heads(header: GgufHeader, key: str, layers: int) -> list[int]:
    """Key/value heads of each layer: one number for all, or 0 where a layer does not attend."""
    found = header.metadata.get(key)
    if isinstance(found, list) and len(found) == layers and min(found) >= 0 < max(found):
        return found
    return [_count(header, key)] * layers


def _count(header: GgufHeader, key: str) -> int:
    value = header.metadata.get(key)
    if type(value) is not int or value < 1:
        raise ModelError(
            f"{header.file}: {key} is {value!r}, not a number from 1 on",
            "write the file again with `mule export`, or convert the model anew",
        )
    return value


def _context_length(header: GgufHeader) -> int:
    arch = header.metadata[Keys.General.ARCHITECTURE]
    return _count(header, Keys.LLM.CONTEXT_LENGTH.format(arch=arch))


def _rows(header: GgufHeader, place: int) -> tuple[WeightRows, ...]:
    """A matrix; of experts one for each."""
    tensor = header.tensors[place]
    *matrices, rows, columns = (1, *tensor.shape)
    start, size = header.data_start + tensor.offset, tensor.num_bytes // math.prod(matrices)
    file, dtype = str(header.file.absolute()), tensor.type.name
    return tuple(
        WeightRows(file, start + number * size, dtype, rows, columns)
        for number in range(math.prod(matrices))
    )


# ---------------------------------------------------------------- the header


def _entries(header: GgufHeader, type_name: str) -> list[bytes]:
    """The master's entries as they are, with those of the new type in the place of the old."""
    new = [_pair(_FILE_TYPE, int(TYPES[type_name][1]))]
    if type_name not in _FULL:
        new.append(_pair(_VERSION, GGML_QUANT_VERSION))
    entries: list[bytes] = []
    with open(header.file, "rb") as file:
        for key, (start, stop) in header.places.items():
            if key == _FILE_TYPE:
                entries += new
            elif key != _VERSION and not key.startswith(_QUANTIZE):
                file.seek(start)
                entries.append(file.read(stop - start))
    return entries if _FILE_TYPE in header.places else entries + new


def _pair(key: str, value: str | int) -> bytes:
    if isinstance(value, int):
        return _text(key) + struct.pack("<II", GGUFValueType.UINT32, value)
    return _text(key) + struct.pack("<I", GGUFValueType.STRING) + _text(value)


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _write_head(
    file: Path, *, entries: Sequence[bytes], plan: Sequence[PlannedTensor], alignment: int
) -> None:
    """Everything before the tensors' blocks. Source: docs/gguf.md of ggml, version 3."""
    content = struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(plan), len(entries))
    content += b"".join(entries)
    offset = 0
    for tensor in plan:
        sizes = tuple(reversed(tensor.shape))
        content += _text(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        content += struct.pack("<IQ", tensor.type, offset)
        offset += -(-num_bytes(tensor.shape, tensor.type) // alignment) * alignment
    file.write_bytes(content)
