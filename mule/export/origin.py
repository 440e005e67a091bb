"""What a GGUF file must hold, read from the model it was written from: a folder, or an adapter too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH_NAMES

from mule.adapters.delta import Delta, read_deltas
from mule.adapters.identity import base_identity, recorded_quantization
from mule.adapters.source import Source
from mule.errors import ModelError
from mule.export.families import expected_weights, read_shape
from mule.export.gguf import PlannedTensor, Weights, add_metadata, plan_tensors
from mule.export.layout import gathered, to_llama_cpp
from mule.export.merge_forms import Values, quantized_values
from mule.export.mixtures import TYPES
from mule.export.tokens import TokenTable, read_tokens
from mule.models.folder import read_config

_STORED = {"BF16": torch.bfloat16, "F16": torch.float16}  # what `mule merge` rounds to
# Greatest root mean square error, in parts of the weights', of rounding to a type once.
_ROUNDING = {"BF16": 1.2e-3, "F16": 3e-4}


@dataclass(frozen=True)
class Origin:
    """The folders that a file was written from.

    `base_dir`: what the model was trained from, or the base of its adapter, which is merged into it
    if it is `adapted`. `others`: folders whose weights may be in the file by mistake, by what to
    call them.
    """

    model_dir: Path
    adapter_dir: Path | None = None
    base_dir: Path | None = None
    adapted: bool = False
    others: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Original:
    """A model in the words of llama.cpp: entries, tensors by their names in a file, and values."""

    model_dir: Path
    adapter_dir: Path | None = None

    @cached_property
    def _facts(self) -> tuple[Any, Any]:
        return read_shape(self.model_dir)

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.model_dir)

    @property
    def family(self) -> Any:
        return self._facts[0]

    @property
    def shape(self) -> Any:
        return self._facts[1]

    @cached_property
    def tokens(self) -> TokenTable:
        return read_tokens(self.tokenizer_dir, self.shape.vocab)

    @property
    def tokenizer_dir(self) -> Path:
        """An adapter of Mule's carries the tokenizer that it was trained with."""
        return Source("", self.model_dir, self.adapter_dir).tokenizer_dir

    def weights_sha256(self) -> str | None:
        """The hash that a file written from the folder carries; None for an adapter on it."""
        return base_identity(self.model_dir)["weights"] if self.adapter_dir is None else None

    def metadata(self, type_name: str) -> dict[str, Any]:
        """The entries of a file of this type, as our writer makes them."""
        writer = GGUFWriter(None, MODEL_ARCH_NAMES[self.family.arch])
        add_metadata(writer, self.shape, type_name, {})
        self.tokens.write(writer)
        return {key: _text(entry.value) for key, entry in writer.kv_data[0].items()}

    def tensors(self, type_name: str) -> dict[str, PlannedTensor]:
        """Every tensor that the file must have, by its name there; ModelError as in writing."""
        found = set(self.weights.files)
        expected = expected_weights(self.family, self.shape, found)
        self.weights.check(expected)
        plan = plan_tensors(self.family, self.shape, expected, type_name)
        return {tensor.name: tensor for tensor in plan}

    @cached_property
    def planned(self) -> dict[str, PlannedTensor]:
        """The tensors of the file, with what they take of the folder; a tied head too."""
        tensors = self.tensors(next(iter(TYPES)))
        return {"output.weight": tensors["token_embd.weight"]} | tensors

    @cached_property
    def named(self) -> dict[str, str]:
        """The first weight in the folder that a tensor of the file takes, by its name there."""
        return {name: tensor.source for name, tensor in self.planned.items()}

    @cached_property
    def deltas(self) -> dict[str, Delta]:
        return read_deltas(self.adapter_dir) if self.adapter_dir is not None else {}

    @cached_property
    def _seen(self) -> Values | None:
        """The values that an adapter of QLoRA was trained on."""
        quantized = recorded_quantization(self.adapter_dir) if self.adapter_dir else None
        return quantized_values(read_config(self.model_dir), quantized) if quantized else None

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor `name` of the file, before its blocks are made."""
        tensor = self.planned[name]
        if not tensor.parts:
            return self.shape.rope.factors[name]
        return gathered(tensor.parts, tensor.shape, self._in_file)

    def _in_file(self, source: str) -> npt.NDArray[np.float32]:
        """A weight of the folder with llama.cpp's order of rows and numbers."""
        return to_llama_cpp(self.family, self.shape, source, self.in_folder(source))

    def in_folder(self, source: str) -> npt.NDArray[np.float32]:
        """A weight as the folder has it, the adapter in it as `mule merge` puts it there."""
        values = self.weights.load(source)
        if self.adapter_dir is None:
            return values
        weight = torch.from_numpy(values)
        weight = self._seen(source, weight) if self._seen else weight
        if source in self.deltas:
            weight = self.deltas[source].merged(weight)
        return weight.to(_STORED.get(self._stored_type(source), torch.float32)).float().numpy()

    def _stored_type(self, source: str) -> str:
        """Safetensors' name of the type of a weight."""
        return self.weights.files[source].get_slice(source).get_dtype()

    def rounding(self, name: str) -> float:
        """What merging may have rounded away: the file may come from a merge in another type."""
        sources = dict.fromkeys(part.source for part in self.planned[name].parts)
        merged = [s for s in sources if self.adapter_dir is not None and s in self.deltas]
        return max((_ROUNDING.get(self._stored_type(s), 0.0) for s in merged), default=0.0)


def original_or_none(folder: Path, base: Path | None = None) -> Original | None:
    """The model in `folder`, or the adapter there on `base`; None when it cannot be read.

    Nobody asked for it, so a damaged one is no error.
    """
    adapter = (folder / "adapter_config.json").is_file() and base is not None
    original = Original(base, folder) if adapter and base else Original(folder)
    try:
        _ = original.named, original.deltas
    except ModelError:
        return None
    return original


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return [_text(item) for item in value] if isinstance(value, (list, tuple)) else value
