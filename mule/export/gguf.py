"""A Hugging Face folder written as one GGUF file, tensor by tensor, and read back before it counts.

Source: docs/gguf.md of ggml, and llama.cpp's conversion/ at b11549 for keys and names.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFWriter
from gguf.constants import (
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
)
from gguf.tensor_mapping import get_tensor_name_map
from gguf.utility import size_label

from mule.errors import ModelError
from mule.export.families import (
    Family,
    ModelShape,
    Part,
    expected_weights,
    read_shape,
)
from mule.export.families.shape import Stack
from mule.export.gguf_file import (
    GgufContent,
    GgufReport,
    PlannedTensor,
    Rows,
    how_made,
    report,
    write_file,
    write_head,
)
from mule.export.imatrix_file import ImportanceMatrix
from mule.export.layout import is_decay, norm_offset, turned_heads
from mule.export.mixtures import TYPES, Mixture, num_bytes
from mule.export.quantize import Quantizer
from mule.export.tokens import read_tokens
from mule.generate.weight_rows import WeightRows
from mule.models.folder import weight_files
from mule.models.tensor_file import StoredTensor, open_tensors, stored_tensors

_NUM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # by safetensors' names
Entry = str | int | float | Sequence[str]  # the value of an entry of the file


def write_gguf(
    model_dir: Path | str,
    out_file: Path | str,
    type_name: str,
    *,
    metadata: Mapping[str, Entry] | None = None,
    importance: ImportanceMatrix | None = None,
    quantizer: Quantizer | None = None,
) -> GgufReport:
    """Write the model in `model_dir` as `out_file`, of a type in mixtures.TYPES.

    `metadata` adds entries; a key without a dot is one of general.* (name, license, ...).
    `importance` weighs the errors of columns. A `quantizer` given serves several files.

    Raises ModelError for a model that llama.cpp cannot run as it is, StorageError for the disk.
    """
    start = time.monotonic()
    model_dir, out_file = Path(model_dir), Path(out_file)
    require_type(type_name)
    family, shape = read_shape(model_dir)
    weights = Weights(model_dir)
    expected = expected_weights(family, shape, set(weights.files))
    weights.check(expected)
    plan = plan_tensors(family, shape, expected, type_name, weighed=importance is not None)
    tokens = read_tokens(model_dir, shape.vocab)

    writer = GGUFWriter(None, MODEL_ARCH_NAMES[family.arch])
    named: dict[str, Entry] = {"name": model_dir.resolve().name, **(metadata or {})}
    named["name"] = tokens.model_name(str(named["name"]))
    num_params = sum(math.prod(tensor.shape) for tensor in plan)
    named["size_label"] = size_label(num_params, 0, 0, 0)
    add_metadata(writer, shape, type_name, named)
    tokens.write(writer)
    columns = {}
    if importance is not None:
        importance.check({tensor.name: tensor.shape for tensor in plan})
        columns = importance.columns()
        add_entries(writer, importance.entries())
    rows = {tensor.name: _rows(family, shape, weights, tensor) for tensor in plan}
    head = partial(write_head, writer=writer, plan=plan)
    content = GgufContent(head, writer.data_alignment, plan, rows, len(tokens.tokens), columns)
    with contextlib.ExitStack() as stack:
        quantizer = quantizer or stack.enter_context(Quantizer())
        header = write_file(out_file, content, quantizer, f"Writing {type_name}")
    notes = [*shape.notes, *tokens.notes, *how_made(quantizer)]
    context = shape.exact_context
    return report(
        header, out_file, type_name, plan, exact_context=context, notes=notes, start=start
    )


def require_type(type_name: str) -> None:
    """Raises ModelError for what is no type."""
    if type_name not in TYPES:
        raise ModelError(f"no GGUF type {type_name!r}", f"choose among {', '.join(TYPES)}")


# ---------------------------------------------------------------- reading


class Weights:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.files: dict[str, Any] = {}
        self._places: dict[str, tuple[Path, StoredTensor]] = {}
        for file in weight_files(model_dir):
            handle = open_tensors(file, "download or save it again")
            self.files |= dict.fromkeys(handle.keys(), handle)
            self._places |= {tensor.name: (file, tensor) for tensor in stored_tensors(file)}

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Every weight has the shape that config.json implies, and a type that is plain numbers."""
        for name, shape in expected.items():
            part = self.files[name].get_slice(name)
            if (found := tuple(part.get_shape())) != shape:
                raise ModelError(
                    f"{self.model_dir}: {name} has shape {found}, config.json says {shape}",
                    "the weights belong to another config.json",
                )
            if part.get_dtype() not in _NUM_BYTES:
                raise ModelError(
                    f"{self.model_dir}: {name} is stored as {part.get_dtype()}",
                    "export the model in float32, float16 or bfloat16",
                )

    def load(self, name: str) -> npt.NDArray[np.float32]:
        return self.files[name].get_tensor(name).to(torch.float32).numpy()

    def whole(self, name: str) -> Part:
        """All rows of a weight; those of a vector are its numbers."""
        shape = self._places[name][1].shape
        return Part(name, 0, math.prod(shape[:-1]) if len(shape) > 1 else shape[0])

    def rows(self, part: Part, **change: Any) -> WeightRows:
        """Where some rows of a weight are; `change` is what WeightRows does to them."""
        file, stored = self._places[part.source]
        columns = stored.shape[-1] if len(stored.shape) > 1 else 1
        row_bytes = columns * _NUM_BYTES[stored.dtype]
        start = stored.start + part.first * row_bytes
        return WeightRows(str(file.absolute()), start, stored.dtype, part.count, columns, **change)


def _rows(family: Family, shape: ModelShape, weights: Weights, tensor: PlannedTensor) -> Rows:
    """Where the numbers of a tensor are, in llama.cpp's order of rows."""
    if not tensor.parts:
        return shape.rope.factors[tensor.name]
    return tuple(
        weights.rows(
            part,
            heads=turned_heads(family, shape, part.source),
            added=norm_offset(family, part.source),
            decay=is_decay(part.source),
        )
        for part in tensor.parts
    )


def plan_tensors(
    family: Family,
    shape: ModelShape,
    expected: dict[str, tuple[int, ...]],
    type_name: str,
    *,
    weighed: bool = False,
) -> list[PlannedTensor]:
    """Every tensor of the file to be, in its order, from the weights that are `expected`.

    `weighed`: with an importance matrix, which changes what some tensors get.
    """
    mixture = _mixture(shape, type_name, tied="lm_head.weight" not in expected, weighed=weighed)
    plan = []
    for name, factors in shape.rope.factors.items():
        kind = GGMLQuantizationType.F32
        plan.append(PlannedTensor((), name, factors.shape, kind, kind))
    for name, stack in _stacks(family, shape, expected).items():
        kinds = mixture.tensor_type(name, stack.shape)
        plan.append(PlannedTensor(stack.parts, name, stack.shape, *kinds))
    return plan


def _mixture(shape: ModelShape, type_name: str, *, tied: bool, weighed: bool) -> Mixture:
    attending = shape.attention_layers
    return Mixture(
        type_name,
        shape.layers,
        tied,
        shape.heads // shape.kv_heads if 0 in attending else 0,
        weighed,
        attending=attending,
        experts=shape.experts.count if shape.experts else 0,
    )


def _stacks(
    family: Family, shape: ModelShape, expected: dict[str, tuple[int, ...]]
) -> dict[str, Stack]:
    """Of every tensor, by its name: the weights in it, and its shape; layer by layer."""
    names = get_tensor_name_map(family.arch, shape.layers)
    stacks = {
        name: stack
        for layer in range(shape.layers)
        for name, stack in family.stacked(shape, layer).items()
    }
    first: defaultdict[str, list[str]] = defaultdict(list)
    for name, stack in stacks.items():
        first[stack.parts[0].source].append(name)
    taken = {part.source for stack in stacks.values() for part in stack.parts}
    found: dict[str, Stack] = {}
    for source, sizes in expected.items():
        found |= {name: stacks[name] for name in first[source]}
        if source in taken:
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"{source} has no name in a GGUF file", "report this model to Mule")
        count = math.prod(sizes[:-1]) if len(sizes) > 1 else sizes[0]
        found[name] = Stack((Part(source, 0, count),), sizes)
    return found


def planned_bytes(model_dir: Path, type_name: str, weights: set[str]) -> int:
    """Bytes of the tensors in the file to be, from config.json and the names of the weights."""
    family, shape = read_shape(model_dir)
    plan = plan_tensors(family, shape, expected_weights(family, shape, weights), type_name)
    return sum(num_bytes(tensor.shape, tensor.type) for tensor in plan)


# ---------------------------------------------------------------- writing


def add_entries(writer: GGUFWriter, entries: Mapping[str, Entry]) -> None:
    """Entries as they are given; a key without a dot is one of general.*."""
    for key, value in entries.items():
        key = key if "." in key else f"general.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)


def add_metadata(
    writer: GGUFWriter, shape: ModelShape, type_name: str, metadata: Mapping[str, Entry]
) -> None:
    """The entries that describe the model, but for its tokenizer's."""
    writer.add_type(GGUFType.MODEL)
    add_entries(writer, metadata)
    writer.add_file_type(int(TYPES[type_name][1]))
    if type_name not in ("f32", "f16", "bf16"):
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    of_layers = [shape.kv_heads * (i in shape.attention_layers) for i in range(shape.layers)]
    writer.add_head_count_kv(of_layers if 0 in of_layers else shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_vocab_size(shape.vocab)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    if shape.rope.dim:
        writer.add_rope_dimension_count(shape.rope.dim)
        writer.add_rope_freq_base(shape.rope.theta)
    if shape.experts is not None:
        writer.add_expert_count(shape.experts.count)
        writer.add_expert_used_count(shape.experts.used)
    own = shape.rope.keys | shape.keys | (shape.ssm.entries() if shape.ssm else {})
    add_entries(writer, {key.format(arch=writer.arch): value for key, value in own.items()})
