"""How many parameters a recipe's model has, as far as that can be told without its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mule import fsio
from mule.config.schema import Recipe
from mule.errors import MuleError
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.families import family
from mule.plan.shape import new_model_config
from mule.plan.subject import published_shape

_IN_NAME = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])")
_UNITS = {"b": 1e9, "m": 1e6}


@dataclass(frozen=True)
class Size:
    """Parameters and vocabulary, 0 where unknown, and where that is from."""

    parameters: float
    vocab_size: int
    source: str
    is_exact: bool = True


def size_of(recipe: Recipe, folder: Path | None = None) -> Size | None:
    """Of the recipe's model; `folder` is a run's, whose checkpoint tells the shape."""
    for place in (folder, Path(recipe.model.path) if recipe.model.path else None):
        if place is not None and (found := _in_folder(place)):
            return found
    return _of_new_model(recipe) if recipe.model.path is None else _by_name(recipe.model.path)


def _of_new_model(recipe: Recipe) -> Size | None:
    tokens = recipe.tokenizer.vocab_size or recipe.model.vocab_size
    if tokens is None:
        return None
    try:
        config = new_model_config(recipe, tokens)
    except MuleError:  # an unfinished shape: training says what is missing
        return None
    return _exact(config, "computed from the shape in the recipe")


def _in_folder(folder: Path) -> Size | None:
    """Of a model's folder, or of a run's newest checkpoint."""
    for place in (folder, *sorted(folder.glob("checkpoint-*"), reverse=True)):
        if (place / "config.json").is_file():
            try:
                raw = fsio.read_json(place / "config.json")
                return _exact(family(raw["model_type"]).from_hf(raw), f"{place}/config.json")
            except (MuleError, KeyError):  # a model of a kind that only others can read
                return None
    return None


def _by_name(path: str) -> Size | None:
    """Of a model on the hub: its published shape, or what its name says."""
    if (config := published_shape(path)) is not None:
        return _exact(config, f"the published shape of {path}")
    if match := _IN_NAME.search(Path(path).name):
        return Size(float(match[1]) * _UNITS[match[2].lower()], 0, f"the name {path}", False)
    return None


def _exact(config: ModelConfig, source: str) -> Size:
    return Size(cost.total_params(config), config.vocab_size, source)
