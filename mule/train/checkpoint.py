"""Saving and loading the state of a run: fp32 masters, moments, one integer.

Randomness is a function of (seed, step), so nothing else is needed to go on bit-identically.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import mule
from mule import fsio
from mule.adapters.identity import save_identity
from mule.adapters.lora import lora_state, save_lora
from mule.errors import UserError
from mule.models.folder import model_state, save_model

if TYPE_CHECKING:
    from mule.train.assemble import Parts

_STATE, _MOMENTS = "state.json", "optimizer.safetensors"


def save_checkpoint(folder: Path, parts: Parts, step: int) -> None:
    """Write the state after `step` updates as a model (or adapter) folder that opens anywhere."""
    optimizer, recipe = parts.optimizer, parts.recipe
    fsio.require_space(folder.parent, checkpoint_bytes(parts), "a checkpoint")
    with fsio.atomic_folder(folder) as out:
        masters = {name: tensor.cpu() for name, tensor in optimizer.master_weights().items()}
        if recipe.adapter.kind == "lora":
            base, identity = parts.base
            save_lora(lora_state(masters), recipe.adapter.lora, str(base), out)
            save_identity(base, identity, out)
        else:
            state = {name: masters.get(name, t) for name, t in model_state(parts.model).items()}
            save_model(state, parts.model.config, out, extra=token_ids(parts.tokenizer))
        parts.tokenizer.save(out)
        moments = {name: tensor.cpu().contiguous() for name, tensor in optimizer.moments().items()}
        save_file(moments, out / _MOMENTS)
        fsio.write_json(out / _STATE, _state(parts, step))


def load_checkpoint(folder: Path, parts: Parts) -> int:
    """Copy a checkpoint's masters and moments into the optimizer; the number of updates done."""
    state = fsio.read_json(folder / _STATE)
    for key, found in _fingerprints(parts).items():
        if state["fingerprints"][key] != found:
            raise UserError(
                f"{folder}: cannot resume, {key} changed since this checkpoint was written",
                "bring the old one back, or start a new run from these weights: "
                f"model.path={folder} and another name",
            )
    weights = {}
    adapter = parts.recipe.adapter.kind == "lora"
    for name, tensor in parts.optimizer.master_weights().items():
        weights[next(iter(lora_state({name: tensor}))) if adapter else name] = tensor
    for file in sorted(folder.glob("*model*.safetensors")):
        _copy_into(weights, file)
    _copy_into(parts.optimizer.moments(), folder / _MOMENTS)
    parts.optimizer.num_updates = state["num_updates"]
    parts.optimizer.refresh_working_weights()
    return state["step"]


def checkpoint_bytes(parts: Parts) -> int:
    """Size of a checkpoint on disk, to ask for the space beforehand."""
    masters = parts.optimizer.master_weights().values()
    return 12 * sum(tensor.numel() for tensor in masters) + 32 * 2**20


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """The special ids that config.json and generation_config.json carry."""
    return {
        "eos_token_id": list(tokenizer.stop_ids),
        "bos_token_id": tokenizer.bos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _state(parts: Parts, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "num_updates": parts.optimizer.num_updates,
        "fingerprints": _fingerprints(parts),
        "mule": mule.__version__,
        "torch": torch.__version__,
    }


def _fingerprints(parts: Parts) -> dict[str, str]:
    return {
        "the recipe": parts.identity,
        "the data": parts.train.shards.folder.name,
        "the tokenizer": parts.tokenizer.fingerprint(),
    }


@torch.no_grad()
def _copy_into(targets: dict[str, torch.Tensor], file: Path) -> None:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            if name in targets:
                targets[name].copy_(tensors.get_tensor(name))
