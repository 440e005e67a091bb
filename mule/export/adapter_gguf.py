"""An adapter as a GGUF file of its own, which llama.cpp puts onto a base file while it runs.

Source: convert_lora_to_gguf.py and src/llama-adapter.cpp of llama.cpp b11549. The runtime adds
scale alpha / r B A x to every product with a weight, r being the columns of B, and one alpha holds for
the whole file.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.constants import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFType, Keys
from gguf.tensor_mapping import get_tensor_name_map

from mule import fsio, progress
from mule.adapters.delta import Delta, read_deltas
from mule.adapters.lora_files import DOWN, UP
from mule.errors import ModelError, UserError
from mule.export.families import Family, ModelShape, read_shape
from mule.export.gguf import Entry, add_entries
from mule.export.layout import to_llama_cpp
from mule.export.merge import require_effect
from mule.generate.gguf_header import read_header
from mule.models.folder import read_config

ADAPTER_TYPES = {"f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16}
_HEADER_BYTES = 2**20
_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class AdapterReport:
    """What was written; `alpha` is llama.cpp's, for all of the adapter's weights."""

    file: str
    type: str
    architecture: str
    size_bytes: int
    num_weights: int
    ranks: list[int]
    alpha: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Half:
    """A or B of one weight, ready to be written."""

    name: str
    values: npt.NDArray


def write_adapter(
    adapter_dir: Path,
    base_dir: Path,
    out_file: Path,
    type_name: str = "f32",
    *,
    metadata: Mapping[str, Entry] | None = None,
) -> AdapterReport:
    """Write the LoRA in `adapter_dir`, on the base in `base_dir`, as `out_file`.

    Raises UserError for what a GGUF adapter cannot say (DoRA, a tied head), ModelError for an adapter
    that is no LoRA or does not fit the base, CheckFailed for one without effect.
    """
    start = time.monotonic()
    if type_name not in ADAPTER_TYPES:
        raise UserError(
            f"an adapter is not written as {type_name}", f"one of {', '.join(ADAPTER_TYPES)}"
        )
    family, shape = read_shape(base_dir)
    deltas = read_deltas(adapter_dir)
    _refuse(adapter_dir, base_dir, deltas)
    alpha = _alpha(deltas)
    numbers = sum(delta.r * sum(delta.shape) for delta in deltas.values())
    fsio.require_space(out_file.parent, 4 * numbers + _HEADER_BYTES, "the adapter file")
    names = _names(family, shape, base_dir, deltas)
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[family.arch])
    writer.add_string(Keys.General.TYPE, GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    add_entries(writer, metadata or {})
    sums: dict[str, int] = {}
    with progress.task("Writing the adapter", total=len(deltas), unit="weights") as bar:
        for name, delta in deltas.items():
            for half in _halves(family, shape, delta, alpha, names[name]):
                values = _as_type(half, type_name)
                sums[half.name] = zlib.crc32(values.data.cast("B"))
                writer.add_tensor(half.name, values)
            bar.advance()
    with fsio.stream_file(out_file, lambda file: _check(file, sums)) as temporary:
        _write(writer, temporary)
    return AdapterReport(
        file=str(out_file),
        type=type_name,
        architecture=MODEL_ARCH_NAMES[family.arch],
        size_bytes=out_file.stat().st_size,
        num_weights=len(deltas),
        ranks=sorted({delta.r for delta in deltas.values()}),
        alpha=alpha,
        seconds=round(time.monotonic() - start, 2),
    )


def is_adapter(gguf_file: Path) -> bool:
    """Whether a file is an adapter in GGUF; False of one that cannot be read."""
    try:
        return read_header(gguf_file).metadata.get(Keys.General.TYPE) == GGUFType.ADAPTER
    except ModelError:
        return False


# ---------------------------------------------------------------- what is refused


def _refuse(adapter_dir: Path, base_dir: Path, deltas: Mapping[str, Delta]) -> None:
    merge = f"put it into its base: mule merge {adapter_dir}, then mule export the result"
    if any(delta.use_dora for delta in deltas.values()):
        raise UserError(
            f"{adapter_dir}: an adapter of DoRA sets the length of its base's rows too, which "
            "llama.cpp's adapters cannot",
            merge,
        )
    if "lm_head.weight" in deltas and read_config(base_dir).tie_embeddings:
        raise UserError(
            f"{adapter_dir}: the adapter changes the head, which in {base_dir} is the embedding: a "
            "GGUF file of it has no head to change",
            "merge it with PEFT (merge_and_unload), and give the merged model",
        )
    require_effect(adapter_dir, deltas)


def _names(
    family: Family, shape: ModelShape, base_dir: Path, deltas: Mapping[str, Delta]
) -> dict[str, str]:
    """What llama.cpp calls each weight that the adapter changes."""
    known = get_tensor_name_map(family.arch, shape.layers)
    sizes = {
        f"model.layers.{layer}.{name}": shape_of_weight
        for layer in range(shape.layers)
        for name, shape_of_weight in family.words(shape, layer).items()
    }
    stacked = {
        part.source: name
        for layer in range(shape.layers)
        for name, stack in family.stacked(shape, layer).items()
        for part in stack.parts
    }
    sizes["lm_head.weight"] = (shape.vocab, shape.hidden)
    names = {}
    for source, delta in deltas.items():
        if source in stacked:
            raise UserError(
                f"the adapter changes {source}, which is a part of {stacked[source]} in a GGUF file, "
                "and an adapter there changes whole tensors",
                "put it into its base (mule merge), then mule export the result",
            )
        name = known.get_name(source, try_suffixes=(".weight",))
        if name is None or sizes.get(source) != delta.shape:
            raise ModelError(
                f"the adapter changes {source} of shape {delta.shape}; in {base_dir} it has "
                f"{'shape ' + str(sizes[source]) if source in sizes else 'no such weight'}",
                "give the base model that this adapter was trained on: --base FOLDER",
            )
        names[source] = name
    return names


# ---------------------------------------------------------------- what is written


def _alpha(deltas: Mapping[str, Delta]) -> float:
    """The alpha of most weights: those with another scale have it in their B."""
    found = [delta.scale * delta.r for delta in deltas.values()]
    return max(set(found), key=found.count)


def _halves(
    family: Family, shape: ModelShape, delta: Delta, alpha: float, name: str
) -> Iterator[_Half]:
    """A (r, in) and B (out, r), B's rows in llama.cpp's order, as those of its weight."""
    tensors = delta.tensors()
    up = to_llama_cpp(family, shape, delta.name, tensors[UP].numpy())
    own = delta.scale * delta.r  # rsLoRA's, or an alpha_pattern's
    if own != alpha:
        up = up * np.float32(own / alpha)
    yield _Half(f"{name}.lora_a", tensors[DOWN].numpy())
    yield _Half(f"{name}.lora_b", up)


def _as_type(half: _Half, type_name: str) -> npt.NDArray:
    values = np.ascontiguousarray(half.values, dtype=np.float32)
    if type_name == "f32":
        return values
    if np.abs(values).max() > _LARGEST_F16:
        raise ModelError(
            f"{half.name} holds values beyond what f16 can hold", "write it as f32: --types f32"
        )
    return torch.from_numpy(values).to(torch.float16).numpy()


def _write(writer: GGUFWriter, file: Path) -> None:
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check(file: Path, sums: Mapping[str, int]) -> None:
    """Read the file back; ModelError where it is not what was written."""
    read_header(file)
    found = {
        tensor.name: zlib.crc32(np.ascontiguousarray(tensor.data).data.cast("B"))
        for tensor in GGUFReader(file).tensors
    }
    if found != dict(sums):
        raise ModelError(
            f"{file}: the adapter was not read back as it was written",
            "the disk may be failing; check it and export again",
        )
