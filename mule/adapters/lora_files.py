"""The files of an adapter, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

An adapter of PEFT opens here, and one of ours there; what Mule does not compute is refused by name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mule import fsio
from mule.config.adapter import LoraSection
from mule.errors import ModelError
from mule.hub.repo import address_of
from mule.models.tensor_file import open_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # how PEFT names the wrapped model in a saved adapter
DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

# What other adapters carry beside, or in place of, low-rank updates of linear layers.
_REFUSED = {
    "modules_to_save": "it replaces whole layers of its base",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it adapts parameters that are not linear layers",
    "lora_bias": "its updates have biases",
    "alora_invocation_tokens": "it acts after certain tokens only",
    "arrow_config": "it mixes several adapters",
    "layer_replication": "it repeats layers of its base",
    "fan_in_fan_out": "its base stores matrices the other way round",
}
# Starts that change the base: the adapter then fits what they left of it.
_CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of an adapter, checked; `raw` is the file."""

    raw: dict[str, Any]

    @property
    def r(self) -> int:
        return int(self.raw["r"])

    @property
    def alpha(self) -> float:
        return float(self.raw["lora_alpha"])

    @property
    def use_dora(self) -> bool:
        return bool(self.raw.get("use_dora"))

    @property
    def use_rslora(self) -> bool:
        return bool(self.raw.get("use_rslora"))

    @property
    def targets(self) -> str | list[str]:
        """The adapted layers: names or their ends, or a regular expression."""
        found = self.raw["target_modules"]
        return found if isinstance(found, str) else sorted(found)

    @property
    def layers(self) -> list[int] | None:
        """The adapted blocks; None for all."""
        found = self.raw.get("layers_to_transform")
        return [found] if isinstance(found, int) else found or None

    def scale(self, module: str, r: int) -> float:
        """The factor of B A for a module of rank `r`."""
        alpha = float(_of_module(self.raw.get("alpha_pattern"), module, self.alpha))
        return lora_scale(r, alpha, rslora=self.use_rslora)

    def rank(self, module: str) -> int:
        return int(_of_module(self.raw.get("rank_pattern"), module, self.r))


def lora_scale(r: int, alpha: float, *, rslora: bool) -> float:
    """alpha/r, or alpha/sqrt(r). Sources: Hu et al. 2021, section 4.1; Kalajdzievski 2023."""
    return alpha / r**0.5 if rslora else alpha / r


def _of_module(patterns: dict[str, Any] | None, module: str, otherwise: float) -> float:
    """What a rank_pattern or alpha_pattern says of a module; as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def read_lora_config(folder: Path | str) -> AdapterConfig:
    """adapter_config.json; ModelError names what in it Mule does not compute."""
    file = Path(folder) / CONFIG
    raw = fsio.read_json(file)
    if raw.get("peft_type") != "LORA":
        raise ModelError(
            f"{folder}: an adapter of kind {raw.get('peft_type')}",
            "Mule loads LoRA, rsLoRA and DoRA adapters; merge this one where it was trained",
        )
    way_out = "merge it with PEFT (merge_and_unload), and give the merged model"
    for key, meaning in _REFUSED.items():
        if raw.get(key):
            raise ModelError(f"{file}: {key} = {json.dumps(raw[key])}: {meaning}", way_out)
    if raw.get("bias", "none") != "none":
        raise ModelError(f"{file}: bias = {raw['bias']}: it changes biases of its base", way_out)
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        raise ModelError(
            f"{file}: init_lora_weights = {start}: the adapter fits a base that this start changed",
            "save it from PEFT with path_initial_model_for_weight_conversion, which gives a plain "
            "LoRA of the unchanged base",
        )
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if raw.get(key) is None]:
        raise ModelError(f"{file}: has no {missing[0]}", "save or download the adapter again")
    return AdapterConfig(raw)


def open_weights(folder: Path | str) -> Any:
    """The open adapter_model.safetensors, whose tensors are read when asked for."""
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        pickled = Path(folder) / "adapter_model.bin"
        what = (
            f" ({pickled.name} is a pickle file, which can run code)" if pickled.is_file() else ""
        )
        raise ModelError(
            f"{folder}: {WEIGHTS} is missing{what}",
            "save the adapter from PEFT again: save_pretrained(FOLDER, safe_serialization=True)",
        )
    return open_tensors(file, "save or download it again")


def save_lora(
    state: dict[str, torch.Tensor], settings: LoraSection, base: str, folder: Path
) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an open atomic folder.

    `state` has PEFT's names. A rank in it that differs from `settings.r` (PiSSA's) is what is
    written, with the alpha that leaves the scale as it was.
    """
    r = min(tensor.shape[0] for name, tensor in state.items() if name.endswith(DOWN))
    grown = r / settings.r
    modules = {name.rpartition(".lora_")[0].removeprefix(PREFIX) for name in state}
    layers = sorted({int(number[1]) for m in modules if (number := re.search(r"\.(\d+)\.", m))})
    address = address_of(Path(base))  # a hub model goes by its name, which is found anywhere
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": address[0] if address else base,
        "revision": address[1] if address else None,
        "r": r,
        "lora_alpha": settings.alpha * (grown**0.5 if settings.use_rslora else grown),
        "lora_dropout": settings.dropout,
        "target_modules": sorted(_written_targets(settings, modules)),
        "layers_to_transform": layers if settings.last_layers > 0 else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _written_targets(settings: LoraSection, modules: set[str]) -> set[str]:
    """Names that PEFT finds the same modules by: it reads layers_to_transform with ends only."""
    if settings.target_modules == "all-linear":
        return {module.rpartition(".")[2] for module in modules}
    return set(settings.target_modules)
