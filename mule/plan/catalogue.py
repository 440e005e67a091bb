"""What the models of the fine-tuning recipes take, computed from their published shapes. No torch.

recipes/models.json has the shapes, recipes/catalogue.json what is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mule import fsio
from mule.config.load import load_recipe
from mule.config.presets import preset_file
from mule.config.schema import Recipe
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.families import family
from mule.plan import memory

CHATS, CHAT_TOKENS, EPOCHS = 400, 200, 3  # what the times are for
SHARE_OF_PEAK = 0.25  # of the matrix products' peak that training reaches; cautious
FITS_SHARE = 0.75  # of the memory; the rest is for the system and other programs
_HUB_BYTES = 2  # a weight on the hub, in bf16


@dataclass(frozen=True)
class Entry:
    """A recipe of the catalogue, and the model it is for."""

    name: str
    model: str  # hub id
    task: str  # chat or code
    gpus: int  # that the recipe is made for; 0: none are needed
    raw: dict[str, Any]  # config.json as published, without what has no effect
    config: ModelConfig
    recipe: Recipe


def entries(models: Path) -> list[Entry]:
    """The catalogue of models.json; every recipe named there must exist."""
    known = fsio.read_json(models)
    return [_entry(name, known) for name in known]


def figures(entry: Entry) -> dict[str, Any]:
    """Bytes and FLOPs, each computed; memory by the width of the arithmetic."""
    return {
        "parameters": cost.total_params(entry.config),
        "download_bytes": _HUB_BYTES * cost.total_params(entry.config),
        "memory_bytes": {kind: memory_bytes(entry, kind) for kind in ("bf16", "fp32")},
        "flops": train_flops(entry),
    }


def memory_bytes(entry: Entry, precision: str) -> int:
    """The least that one process can do with: state, loss, and one row whose blocks are recomputed.

    Where there is more memory, less is computed again.
    """
    train = entry.recipe.train.model_copy(update={"precision": precision})
    recipe = entry.recipe.model_copy(update={"train": train})
    state = sum(memory.state_bytes(entry.config, recipe, accumulates=True).values())
    row = recipe.data.max_seq_length * memory.activation_bytes_per_token(
        entry.config, recipe.train, "full", adapter=recipe.adapter
    )
    head_trained = recipe.adapter.kind == "none"
    loss = memory.loss_bytes(entry.config, precision, head_trained=head_trained)
    return round(state + loss + row)


def train_flops(entry: Entry) -> float:
    """FLOPs of learning CHATS chats EPOCHS times.

    The blocks below the first adapted one run in the first epoch only: what they give is kept.
    """
    config, tokens = entry.config, CHATS * CHAT_TOKENS
    adapted = config.num_layers - entry.recipe.adapter.lora.first_block(config.num_layers)
    first = cost.lora_flops_per_token(config, CHAT_TOKENS, adapted)
    upper = replace(config, num_layers=adapted)
    later = cost.lora_flops_per_token(upper, CHAT_TOKENS, adapted)
    return tokens * (first + (EPOCHS - 1) * later)


def train_seconds(flops: float, peak_flops: float, gpus: int = 1) -> float:
    """About how long a machine with this peak of matrix products takes."""
    return flops / (SHARE_OF_PEAK * peak_flops * max(1, gpus))


def _entry(name: str, known: dict[str, Any]) -> Entry:
    found = known[name]
    shape = known[found["same_as"]] if "same_as" in found else found
    file = preset_file(name)
    assert file is not None, f"{name} is in the catalogue, but no recipe"
    recipe = load_recipe(file, []).recipe
    is_4bit = recipe.adapter.kind == "qlora"
    return Entry(
        name,
        shape["model"],
        shape["task"],
        found.get("gpus", 1 if is_4bit else 0),
        shape["config"],
        family(shape["config"]["model_type"]).from_hf(shape["config"]),
        recipe,
    )
