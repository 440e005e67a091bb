"""A model folder, in transformers' layout: read and write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mule import fsio
from mule.errors import ModelError
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder, empty_decoder
from mule.models.families import family
from mule.models.loadable import WEIGHTS, holdings_of, without_weights
from mule.models.loadable import read_config as read_config
from mule.models.pickled import PICKLE_SUFFIXES, convert_command
from mule.models.stored import Names
from mule.models.tensor_file import open_tensors

MAX_SHARD_BYTES = 4 * 2**30
_MAX_NAME = 255  # of a file, on common systems
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files of a model, each existing and inside the folder."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = _shard_names(index) if index.is_file() else {WEIGHTS}
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise _missing(folder, file.name)
    return files


def _shard_names(index: Path) -> set[str]:
    """The files that an index names, each one beside it; in the hub's cache they are links."""
    raw = fsio.read_json(index)
    files = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(f"{index}: has no weight_map of names and files", "download it again")
    for name in files.values():
        if Path(name).name != name or len(name) > _MAX_NAME:
            raise ModelError(
                f"{index}: names {name[:_MAX_NAME]!r}, outside the folder", "download it again"
            )
    return set(files.values())


def load_model(
    folder: Path | str, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Decoder:
    """The decoder of a folder, its weights copied into freshly allocated parameters."""
    model = empty_decoder(read_config(folder), dtype, device)
    load_weights(model, folder)
    return model


def _copy(_name: str, parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    parameter.copy_(tensor)


@torch.no_grad()
def load_weights(
    model: Decoder,
    folder: Path | str,
    *,
    fill: Callable[[str, torch.Tensor, torch.Tensor], None] = _copy,
) -> None:
    """Copy a folder's weights into `model`; names, shapes and finiteness are checked.

    `fill` puts a checked tensor where the parameter of a name is.
    """
    wanted, names = dict(model.named_parameters()), Names(model.config)
    if model.config.tie_embeddings:
        wanted.pop("lm_head.weight", None)
    expected = names.all_stored(wanted)
    missing = set(expected)
    for file in weight_files(folder):
        with open_tensors(file) as tensors:
            for name in tensors.keys():
                if name in names.null:
                    _check_null(tensors.get_tensor(name), f"{file}: {name}")
                    continue
                if name not in expected:
                    _refuse_extra(model, file, name)
                    continue
                tensor, place = tensors.get_tensor(name), names.place(name)
                target = place.of(wanted[place.name])
                _check(tensor, target, f"{file}: {name}")
                fill(place.name, target, tensor)
                missing.discard(name)
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing, first {min(missing)}",
            "the files do not fit config.json; download or export the model again",
        )


def save_model(
    state: dict[str, torch.Tensor],
    config: ModelConfig,
    folder: Path,
    *,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write config.json, generation_config.json and sharded weights into an open atomic folder.

    `state` goes by our names; `extra` are token ids for both JSON files (eos_token_id and the like).
    """
    extra = {key: value for key, value in (extra or {}).items() if value is not None}
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    raw = family(config.family).to_hf(config) | {"torch_dtype": dtype} | extra
    _write(folder / "config.json", raw)
    _write(folder / "generation_config.json", extra)
    names = Names(config)
    like = next(iter(state.values()))
    null = {name: like.new_zeros(shape) for name, shape in names.null.items()}
    save_weights(names.stored(state) | null, folder)


def save_weights(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write weights, by their names in files, as model.safetensors, or as shards with an index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if size + num_bytes > MAX_SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += num_bytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write(folder / "model.safetensors.index.json", index)


def model_state(model: Decoder) -> dict[str, torch.Tensor]:
    """The weights to save, by our names; a tied head is left out."""
    state = dict(model.state_dict())
    if model.config.tie_embeddings:
        state.pop("lm_head.weight", None)
    return state


def _missing(folder: Path, name: str) -> ModelError:
    pickles = sorted(f for f in folder.glob("*") if f.suffix in PICKLE_SUFFIXES)
    if name == WEIGHTS and not pickles and any(folder.glob("*.gguf")):
        return without_weights(holdings_of(folder))
    if not pickles:
        return ModelError(f"{folder}: {name} is missing", "download or export the model again")
    return ModelError(
        f"{folder}: {name} is missing ({pickles[0].name} is a pickle file, which can run code "
        "when read)",
        f"convert it, in a process that runs nothing of it: {convert_command(pickles[0])}",
    )


def _check(tensor: torch.Tensor, parameter: torch.Tensor, place: str) -> None:
    if tensor.dtype not in _DTYPES:
        raise ModelError(
            f"{place} is stored as {tensor.dtype}, which is no type of plain weights",
            "save the model in float32, float16 or bfloat16",
        )
    if tensor.shape != parameter.shape:
        raise ModelError(
            f"{place} has shape {tuple(tensor.shape)}, the config says {tuple(parameter.shape)}",
            "the weights belong to another config.json",
        )
    # A sum is finite only when all it is made of are, and takes one pass; it may be too large itself.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise ModelError(f"{place} holds NaN or infinite values", "use an earlier checkpoint")


def _check_null(tensor: torch.Tensor, place: str) -> None:
    """Of the layer that config.json calls null: it must add nothing."""
    if tensor.any():
        raise ModelError(
            f"{place} is of the null attention layer, and not zero: it would change the results",
            "remove null_attention_layer from config.json, and the layer is computed as any other",
        )


def _refuse_extra(model: Decoder, file: Path, name: str) -> None:
    tied_head = name == "lm_head.weight" and model.config.tie_embeddings
    if tied_head or name.endswith("rotary_emb.inv_freq"):
        return
    raise ModelError(
        f"{file}: holds {name}, which this model does not have",
        "remove prefixes such as `module.` or `_orig_mod.`, or use the matching config.json",
    )


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
