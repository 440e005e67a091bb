"""LoRA on our decoder, through peft: its configuration, its initialisation, its file layout.

Source: Hu et al. 2021, section 4.1: y = W x + (alpha / r) B A x.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mule import fsio
from mule.config.schema import LoraSection
from mule.errors import ModelError
from mule.models.decoder import Decoder

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."  # how PEFT names the wrapped model in a saved adapter
# torchao, which peft imports where it is installed, warns of libraries that it can do without.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_lora(model: Decoder, settings: LoraSection, *, seed: int = 0) -> None:
    """Freeze `model` and put a fresh adapter (B = 0) beside each targeted layer, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = settings.target_modules
    names = list(ALL_LINEAR) if targets == "all-linear" else list(targets)
    known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for name in names:
        if name not in known:
            raise ModelError(
                f"adapter.lora.target_modules names {name}, which the model does not have",
                f"choose among {', '.join(ALL_LINEAR)}",
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(
                r=settings.r,
                lora_alpha=settings.alpha,  # type: ignore[arg-type]  (peft scales with floats too)
                lora_dropout=settings.dropout,
                target_modules=names,
                bias="none",
            ),
            model,
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def lora_state(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapter weights under the names of PEFT's files, from names in the model."""
    return {
        _PREFIX + name.replace(".default.", "."): tensor
        for name, tensor in named.items()
        if "lora_" in name
    }


def save_lora(
    state: dict[str, torch.Tensor], settings: LoraSection, base: str, folder: Path
) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an open atomic folder."""
    targets = settings.target_modules
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(ALL_LINEAR if targets == "all-linear" else targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})


def read_lora_config(folder: Path | str) -> dict[str, Any]:
    """adapter_config.json, refused when it asks for more than plain LoRA."""
    raw = fsio.read_json(Path(folder) / _CONFIG)
    if raw.get("peft_type") != "LORA" or raw.get("use_dora") or raw.get("use_rslora"):
        kind = "DoRA or rsLoRA" if raw.get("peft_type") == "LORA" else raw.get("peft_type")
        raise ModelError(f"{folder}: an adapter of kind {kind}", "Mule loads plain LoRA adapters")
    return raw


def load_lora(model: Decoder, folder: Path | str) -> None:
    """Add the adapter of `folder` to `model`; every weight must find its place."""
    raw = read_lora_config(folder)
    targets = raw["target_modules"]
    settings = LoraSection(
        r=raw["r"],
        alpha=float(raw["lora_alpha"]),
        dropout=float(raw.get("lora_dropout", 0.0)),
        target_modules=sorted(targets),
    )
    add_lora(model, settings)
    load_lora_weights(model, folder)


@torch.no_grad()
def load_lora_weights(model: Decoder, folder: Path | str) -> None:
    """Copy the adapter's weights into a model that already carries one of the same shape."""
    file = Path(folder) / _WEIGHTS
    wanted = {
        _PREFIX + name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
        if names != set(wanted):
            differing = min(names ^ set(wanted))
            raise ModelError(
                f"{file}: does not fit the model, first at {differing}",
                "give the base model that this adapter was trained on",
            )
        for name, parameter in wanted.items():
            tensor = tensors.get_tensor(name)
            if tensor.shape != parameter.shape or not torch.isfinite(tensor).all():
                raise ModelError(
                    f"{file}: {name} has shape {tuple(tensor.shape)} or holds NaN; "
                    f"the model needs finite values of shape {tuple(parameter.shape)}",
                    "give the base model that this adapter was trained on",
                )
            parameter.copy_(tensor)


@torch.no_grad()
def merge_lora(model: Decoder) -> int:
    """Fold every adapter into its layer in fp32 and remove it; the number of layers changed."""
    from peft.tuners.lora import Linear as LoraLinear

    merged = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLinear):
            continue
        base = cast(torch.nn.Linear, module.get_base_layer())
        down, up = (cast(torch.nn.Linear, m["default"]) for m in (module.lora_A, module.lora_B))
        delta = up.weight.float() @ down.weight.float()
        base.weight.copy_(base.weight.float() + module.scaling["default"] * delta)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, base)
        merged += 1
    return merged
