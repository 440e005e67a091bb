"""A Hugging Face folder written as one GGUF file, tensor by tensor, and read back before it counts.

Source: docs/gguf.md of ggml, and llama.cpp's conversion/ at b11549 for keys and names.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.constants import (
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    RopeScalingType,
)
from gguf.tensor_mapping import get_tensor_name_map
from safetensors import SafetensorError, safe_open

from mule import fsio, progress
from mule.errors import ModelError
from mule.export.families import (
    Family,
    ModelShape,
    expected_weights,
    interleave_heads,
    read_shape,
    rope_factors,
)
from mule.export.quantize import TYPES, Quantizer, num_bytes, tensor_type
from mule.export.tokens import TokenTable, read_tokens
from mule.generate.gguf_header import read_header

_HEADER_BYTES = 64 * 2**20  # room for the vocabulary when asking for space on the disk
_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})  # safetensors' names
_ROPE_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufReport:
    """What was written. `fallbacks` names each tensor whose row length forced another type."""

    file: str
    type: str
    architecture: str
    pre_tokenizer: str
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
class _Planned:
    """One tensor to write; `source` is its name in the folder, "" for one that is computed."""

    source: str
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType


def write_gguf(
    model_dir: Path | str,
    out_file: Path | str,
    type_name: str,
    *,
    metadata: dict[str, str] | None = None,
) -> GgufReport:
    """Write the model in `model_dir` as `out_file`, of a type in quantize.TYPES.

    `metadata` adds entries; a key without a dot is one of general.* (name, license, ...).

    Raises ModelError for a model that llama.cpp cannot run as it is, StorageError for the disk.
    """
    start = time.monotonic()
    model_dir, out_file = Path(model_dir), Path(out_file)
    if type_name not in TYPES:
        raise ModelError(f"no GGUF type {type_name!r}", f"choose among {', '.join(TYPES)}")
    family, shape = read_shape(model_dir)
    weights = _Weights(model_dir)
    expected = expected_weights(family, shape, set(weights.files))
    weights.check(expected)
    plan, fallbacks = _plan(family, shape, expected, type_name)
    tokens = read_tokens(model_dir, shape.vocab)
    total = sum(num_bytes(tensor.shape, tensor.type) for tensor in plan)
    fsio.require_space(out_file.parent, total + _HEADER_BYTES, "the GGUF file")

    writer = GGUFWriter(None, MODEL_ARCH_NAMES[family.arch])
    _add_metadata(writer, shape, type_name, {"name": model_dir.resolve().name} | (metadata or {}))
    tokens.write(writer)
    sums: dict[str, int] = {}
    quantizer = Quantizer()
    with fsio.stream_file(out_file, lambda file: _check(file, plan, sums, tokens)) as temporary:
        with quantizer:
            _write_tensors(
                writer, temporary, plan, _Source(family, shape, weights, quantizer), sums
            )
    return _report(out_file, type_name, plan, fallbacks, _notes(tokens, quantizer), start)


# ---------------------------------------------------------------- reading


class _Weights:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.files: dict[str, Any] = {}
        for file in _weight_files(model_dir):
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{file}: not a readable safetensors file ({error})",
                    "download or save it again",
                ) from None
            self.files |= dict.fromkeys(handle.keys(), handle)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Every weight has the shape that config.json implies, and a type that is plain numbers."""
        for name, shape in expected.items():
            part = self.files[name].get_slice(name)
            if (found := tuple(part.get_shape())) != shape:
                raise ModelError(
                    f"{self.model_dir}: {name} has shape {found}, config.json says {shape}",
                    "the weights belong to another config.json",
                )
            if part.get_dtype() not in _DTYPES:
                raise ModelError(
                    f"{self.model_dir}: {name} is stored as {part.get_dtype()}",
                    "export the model in float32, float16 or bfloat16",
                )

    def load(self, name: str) -> npt.NDArray[np.float32]:
        return self.files[name].get_tensor(name).to(torch.float32).numpy()


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(fsio.read_json(index)["weight_map"].values())
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index}: names {name!r}, outside the folder", "download it again")
        if not (model_dir / name).is_file():
            raise ModelError(
                f"{model_dir / name}: no such file",
                "Mule reads safetensors only; save the model with save_pretrained",
            )
    return [model_dir / name for name in sorted(names)]


@dataclass(frozen=True)
class _Source:
    """Where the tensors' bytes come from."""

    family: Family
    shape: ModelShape
    weights: _Weights
    quantizer: Quantizer

    def values(self, tensor: _Planned) -> npt.NDArray:
        """The bytes of one tensor, in llama.cpp's order of rows and of the planned type."""
        if tensor.name == _ROPE_FREQUENCIES:
            values = rope_factors(self.shape)
            assert values is not None
        else:
            values = self.weights.load(tensor.source)
        if self.family.permuted and ".q_proj." in tensor.source:
            values = interleave_heads(values, self.shape.heads)
        if self.family.permuted and ".k_proj." in tensor.source:
            values = interleave_heads(values, self.shape.kv_heads)
        return self.quantizer.encode(tensor.source or tensor.name, values, tensor.type)


def _plan(
    family: Family, shape: ModelShape, expected: dict[str, tuple[int, ...]], type_name: str
) -> tuple[list[_Planned], list[str]]:
    names = get_tensor_name_map(family.arch, shape.layers)
    tied = "lm_head.weight" not in expected
    plan, fallbacks = [], []
    if rope_factors(shape) is not None:
        size = (shape.head_dim // 2,)
        plan.append(_Planned("", _ROPE_FREQUENCIES, size, GGMLQuantizationType.F32))
    for source, sizes in expected.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"{source} has no name in a GGUF file", "report this model to Mule")
        wanted, kind = tensor_type(name, sizes, type_name, shape.layers, tied)
        if kind != wanted:
            fallbacks.append(f"{name}: rows of {sizes[-1]}, {wanted.name} -> {kind.name}")
        plan.append(_Planned(source, name, sizes, kind))
    return plan, fallbacks


# ---------------------------------------------------------------- writing


def _add_metadata(
    writer: GGUFWriter, shape: ModelShape, type_name: str, metadata: dict[str, str]
) -> None:
    writer.add_type(GGUFType.MODEL)
    for key, value in metadata.items():
        writer.add_string(key if "." in key else f"general.{key}", value)
    writer.add_file_type(int(TYPES[type_name][1]))
    if type_name not in ("f32", "f16", "bf16"):
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_vocab_size(shape.vocab)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    if shape.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(shape.rope["factor"]))


def _write_tensors(
    writer: GGUFWriter, file: Path, plan: list[_Planned], source: _Source, sums: dict[str, int]
) -> None:
    """Header first, then one tensor at a time; `sums` gets the CRC-32 of each."""
    for tensor in plan:
        # The type given as float32 keeps the shape in weights; raw_dtype is what is stored.
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            num_bytes(tensor.shape, tensor.type),
            raw_dtype=tensor.type,
        )
    total = sum(math.prod(tensor.shape) for tensor in plan)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.task("Writing GGUF", total=total, unit="weights") as bar:
            for tensor in plan:
                data = source.values(tensor)
                sums[tensor.name] = zlib.crc32(data.data.cast("B"))
                writer.write_tensor_data(data)
                bar.advance(math.prod(tensor.shape))
    finally:
        writer.close()


def _check(file: Path, plan: list[_Planned], sums: dict[str, int], tokens: TokenTable) -> None:
    """Read the file back with gguf's reader and ours; raise ModelError where they differ."""
    read_header(file)
    reader = GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in plan:
        found = stored.get(tensor.name)
        if (
            found is None
            or found.tensor_type != tensor.type
            or tuple(reversed(found.shape.tolist())) != tensor.shape
            or zlib.crc32(np.ascontiguousarray(found.data).data.cast("B")) != sums[tensor.name]
        ):
            raise ModelError(
                f"{file}: {tensor.name} was not read back as it was written",
                "the disk may be failing; check it and export again",
            )
    merges = reader.get_field("tokenizer.ggml.tokens")
    if len(stored) != len(plan) or merges is None or len(merges.data) != len(tokens.tokens):
        raise ModelError(
            f"{file}: was not read back as it was written", "check the disk and export again"
        )


def _notes(tokens: TokenTable, quantizer: Quantizer) -> list[str]:
    notes = list(tokens.notes)
    if quantizer.native is False:
        notes.append(f"blocks made by NumPy, not by llama.cpp: {quantizer.reason}")
    return notes


def _report(
    file: Path,
    type_name: str,
    plan: list[_Planned],
    fallbacks: list[str],
    notes: list[str],
    start: float,
) -> GgufReport:
    header = read_header(file)
    for line in (*fallbacks, *notes):
        progress.note(line, "warning")
    return GgufReport(
        file=str(file),
        type=type_name,
        architecture=header.metadata["general.architecture"],
        pre_tokenizer=header.metadata["tokenizer.ggml.pre"],
        size_bytes=header.size_bytes,
        num_params=header.num_params,
        bits_per_weight=round(header.bits_per_weight, 3),
        tensor_types=dict(Counter(tensor.type.name for tensor in plan)),
        fallbacks=fallbacks,
        notes=notes,
        seconds=round(time.monotonic() - start, 2),
    )
