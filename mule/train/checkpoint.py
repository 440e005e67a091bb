"""Saving and loading the state of a run: fp32 masters, moments, one integer.

Randomness is a function of (seed, step), so nothing else is needed to go on bit-identically.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import mule
from mule import fsio
from mule.adapters.identity import save_identity
from mule.adapters.lora import lora_state
from mule.adapters.lora_files import save_lora
from mule.adapters.nf4 import QUANTIZED
from mule.adapters.start import for_unchanged_base, trained_part
from mule.errors import StorageError, UserError
from mule.models.folder import model_state, save_model, weight_files
from mule.models.own_model import OwnModel
from mule.models.stored import Names
from mule.models.tensor_file import open_tensors

if TYPE_CHECKING:
    from mule.train.assemble import Parts
    from mule.train.distributed import Group

_STATE, _MOMENTS = "state.json", "optimizer.safetensors"
_ROUTING = "routing.safetensors"  # of a mixture of experts
_SHARES = "optimizer"  # a folder in place of the file, when processes held the moments in shares


def save_checkpoint(folder: Path, parts: Parts, step: int) -> None:
    """Write the state after `step` updates as a model (or adapter) folder that opens anywhere.

    All processes of a run call it; the first writes, and the others their shares of the moments.
    """
    optimizer, group = parts.optimizer, parts.group
    if group.is_first:
        fsio.require_space(folder.parent, checkpoint_bytes(parts), "a checkpoint")
    with folder_for_all(folder, group) as out:
        write_model(optimizer.master_weights(), parts, out)
        if parts.is_sharded:
            from mule.train.sharded import save_shares

            save_shares(optimizer.moments(), out / _SHARES, group)
        elif group.is_first:
            moments = {name: t.cpu().contiguous() for name, t in optimizer.moments().items()}
            save_file(moments, out / _MOMENTS)
        routing = _routing(parts)
        if group.is_first:
            if routing:
                save_file(routing, out / _ROUTING)
            fsio.write_json(out / _STATE, _state(parts, step))


@contextlib.contextmanager
def folder_for_all(path: Path, group: Group) -> Iterator[Path]:
    """`fsio.atomic_folder` of the first process, for all of them to write into."""
    if not group.is_first:
        yield Path(group.from_first(str))
        return
    with fsio.atomic_folder(path) as out:
        group.from_first(lambda: str(out))
        yield out


def write_model(weights: dict[str, torch.Tensor], parts: Parts, out: Path) -> None:
    """Write fp32 `weights`, by their names in the model, and the tokenizer into an open folder.

    All processes call it, and the first writes: whole tensors, where the others hold shares of them.
    """
    frozen = {}
    if parts.recipe.adapter.kind == "none":
        named = parts.model.named_parameters()
        frozen = {name: tensor.detach() for name, tensor in named if not tensor.requires_grad}
        weights = weights | frozen
    if parts.is_sharded:
        from mule.train.sharded import gather

        weights = gather(weights, parts.group)
    if not parts.group.is_first:
        return
    weights = {name: tensor.cpu() for name, tensor in weights.items()}
    adapter = parts.recipe.adapter
    if adapter.kind != "none":
        base, identity = parts.base
        state = for_unchanged_base(parts.model, lora_state(weights))
        save_lora(state, adapter.lora, str(base), out)
        quantized = QUANTIZED[adapter.lora.double_quant] if adapter.kind == "qlora" else None
        save_identity(base, identity, out, quantized=quantized)
    elif isinstance(parts.model, OwnModel):
        parts.model.write(weights, out)
    else:
        kept = {name: weights[name] for name in frozen}
        weights |= _unrounded(kept, parts.base[0], Names(parts.config))
        state = {name: weights[name].float() for name in model_state(parts.model)}
        save_model(state, parts.model.config, out, extra=token_ids(parts.tokenizer))
    parts.tokenizer.save(out)


def _unrounded(
    frozen: dict[str, torch.Tensor], base: Path, names: Names
) -> dict[str, torch.Tensor]:
    """What train.freeze leaves as it is, as the base has it, where it is computed with less."""
    if base == Path() or all(tensor.dtype == torch.float32 for tensor in frozen.values()):
        return frozen
    exact = {name: torch.empty(tensor.shape) for name, tensor in frozen.items()}
    copy_into(names.stored(exact), *weight_files(base))
    return exact


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
    if isinstance(parts.model, OwnModel):
        parts.model.check_same(folder)
    weights = _stored(parts.optimizer.master_weights(), parts)
    copy_into(weights, *sorted(folder.glob("*model*.safetensors")))
    if (folder / _SHARES).is_dir():
        from mule.train.sharded import load_shares

        load_shares(parts.optimizer.moments(), folder / _SHARES)
    else:
        copy_into(parts.optimizer.moments(), folder / _MOMENTS)
    _load_routing(parts, folder / _ROUTING)
    parts.optimizer.num_updates = state["num_updates"]
    parts.optimizer.refresh_working_weights()
    if parts.scaler:
        parts.scaler.load(state["loss_scale"])
    return state["step"]


def _stored(masters: dict[str, torch.Tensor], parts: Parts) -> dict[str, torch.Tensor]:
    """The masters, and what else a checkpoint has of the model, by their names in its files."""
    if isinstance(parts.model, OwnModel):
        return masters | parts.model.kept_buffers()
    if parts.recipe.adapter.kind == "none":
        return Names(parts.config).stored(masters)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in masters.items():
        weights |= lora_state({name: tensor})
    return weights


def _routing(parts: Parts) -> dict[str, torch.Tensor]:
    """The routers' biases and counts, which all processes add up; empty without experts."""
    balance, group = parts.model.balance, parts.group
    return {} if balance is None else balance.state(group.sum_, is_first=group.is_first)


def _load_routing(parts: Parts, file: Path) -> None:
    balance = parts.model.balance
    if balance is not None:
        state = balance.empty_state()
        copy_into(state, file)
        balance.load(state, is_first=parts.group.is_first)


def checkpoint_bytes(parts: Parts) -> int:
    """Size of a checkpoint on disk, to ask for the space beforehand."""
    size = parts.optimizer.state_bytes() + 32 * 2**20
    if parts.recipe.adapter.kind == "none":
        size += sum(4 * p.numel() for p in parts.model.parameters() if not p.requires_grad)
    return size


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
        "loss_scale": parts.scaler.state() if parts.scaler else None,
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
def copy_into(targets: dict[str, torch.Tensor], *files: Path) -> None:
    """Fill all targets from the files; StorageError names one that none of them holds."""
    missing = set(targets)
    for file in files:
        with open_tensors(file) as tensors:
            for name in missing.intersection(tensors.keys()):
                stored = trained_part(tensors.get_tensor(name), targets[name].shape)
                _copy(targets[name], stored)
                missing.discard(name)
    if missing:
        raise StorageError(
            f"{files[0].parent if files else 'the checkpoint'}: no file holds {min(missing)}",
            "take an older checkpoint: remove this folder, and resume",
        )


def _copy(target: torch.Tensor, whole: torch.Tensor) -> None:
    if type(target) is not torch.Tensor:
        from mule.train.sharded import share_like

        whole = share_like(whole, target)
    target.copy_(whole)
