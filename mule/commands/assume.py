"""What `mule train --model X --data ./data` means: every setting that was not said, with its reason.

How long, how fast and in what portions is decided when the run starts (mule/plan/fine_tune.py).
"""

from __future__ import annotations

import math
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mule.config.schema import Recipe
    from mule.models.config import ModelConfig
    from mule.tokenizer import Tokenizer

Assumed = dict[str, tuple[Any, str]]  # dotted key -> value and reason

_USUAL_LENGTH = 1024  # where the data cannot be measured
_MAX_LENGTH = 2048  # that is chosen unasked: memory grows with the row
_LENGTH_STEP = 128
_MOST_ROWS = 0.99  # of the examples fit into a row
_MAX_MEASURED = 5_000  # chats
_MEASURED_AT_ONCE = 256
_LAST_LAYERS = 8
_SMALL_PARAMS = 100_000_000  # of models below this, every block is adapted on any machine
_KIND, _LAYERS, _LENGTH = "adapter.kind", "adapter.lora.last_layers", "data.max_seq_length"


def name_of(overrides: list[str]) -> str:
    """The run's name, from the model and the data that `overrides` name.

    Raises UserError when one of the two is missing.
    """
    recipe = begun(overrides)
    _require_both(recipe)
    if recipe.name:
        return recipe.name
    assert recipe.model.path is not None
    name = f"{_model_word(recipe.model.path)}-{_data_word(recipe.data.train[0])}"
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._").lower()[:100]
    return found or "run"


def assumptions(overrides: list[str], name: str) -> Assumed:
    """What is set beside the overrides: kind of adapter, blocks adapted, length of a row.

    Reads the data once, and fetches a model of the hub.
    """
    import torch

    from mule.models.folder import read_config
    from mule.train.assemble import find_tokenizer
    from mule.train.base import base_folder

    recipe = begun(overrides)
    _require_both(recipe)
    base = base_folder(recipe)
    assert base is not None
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    config = read_config(base)
    return name_and_adapter(overrides, name) | fitting(
        recipe, config, lambda: find_tokenizer(recipe, base), has_gpu=has_gpu
    )


def name_and_adapter(overrides: list[str], name: str) -> Assumed:
    """The run's name, and an adapter where nothing else is asked for."""
    found: Assumed = {"name": (name, "")}
    if not any(word.startswith(f"{_KIND}=") for word in overrides):
        found[_KIND] = (
            "lora",
            "the usual way on one machine; adapter.kind=none trains all weights",
        )
    return found


def fitting(
    recipe: Recipe, config: ModelConfig, tokenizer: Callable[[], Tokenizer | None], *, has_gpu: bool
) -> Assumed:
    """What suits the model and the data: blocks adapted, and the length of a row."""
    given, found = set(recipe.given()), {}
    if recipe.adapter.kind != "none" and _LAYERS not in given:
        found |= _blocks(config, has_gpu=has_gpu and recipe.train.device != "cpu")
    if _LENGTH not in given and (words := tokenizer()) is not None:
        found[_LENGTH] = _row_length(recipe, words, config)
    return found


def tell(assumed: Assumed) -> None:
    """Say what was assumed, a line each."""
    from mule import progress

    for key, (value, reason) in assumed.items():
        if reason:
            progress.note(f"assumed: {key}={value} ({reason})")


def begun(overrides: list[str]) -> Recipe:
    """The recipe of what was said, with an adapter unless it says otherwise."""
    from mule.config.load import load_recipe

    return load_recipe(None, overrides, complete=False, assumed={_KIND: ("lora", "")}).recipe


def _require_both(recipe: Recipe) -> None:
    if recipe.model.path is None:
        raise UserError(
            "--data without a model: nothing says what to train",
            "add --model, with a hub id, a folder or a run: --model Qwen/Qwen2.5-0.5B-Instruct",
        )
    if not recipe.data.train:
        raise UserError(
            "--model without data: nothing says what to learn",
            "add --data, a folder with train.jsonl in it or a file; `mule init` writes an example",
        )


def _model_word(path: str) -> str:
    """What a path or a hub id is called: its last part, for a checkpoint its run."""
    place = Path(path).resolve() if Path(path).exists() else Path(path)
    return (place.parent if place.name.startswith("checkpoint-") else place).name


def _data_word(path: str) -> str:
    """What data is called: its folder, or its file without endings."""
    place = Path(path).resolve() if Path(path).exists() else Path(path)
    return place.name if place.is_dir() else place.name.partition(".")[0]


def _blocks(config: ModelConfig, *, has_gpu: bool) -> Assumed:
    """Adapt the last blocks only where computing is slow: what lies below is then computed once."""
    from mule.models import cost

    small = cost.total_params(config) < _SMALL_PARAMS
    if small or config.num_layers <= _LAST_LAYERS or has_gpu:
        return {}
    reason = (
        f"no GPU: of {config.num_layers} blocks the last {_LAST_LAYERS} are adapted, "
        "the others only run forward; -1 adapts all"
    )
    return {_LAYERS: (_LAST_LAYERS, reason)}


def _row_length(recipe: Recipe, tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, str]:
    """Tokens of a row that hold all but the longest hundredth of the chats."""
    most = min(_MAX_LENGTH, config.max_position_embeddings)
    lengths = _lengths(recipe, tokenizer)
    if not lengths:
        return min(_USUAL_LENGTH, most), "the usual length for texts"
    needed = lengths[min(len(lengths) - 1, math.ceil(_MOST_ROWS * len(lengths)) - 1)]
    rounded = min(most, _LENGTH_STEP * math.ceil(needed / _LENGTH_STEP))
    told = f"of {len(lengths):,} chats {_MOST_ROWS:.0%} have at most {needed:,} tokens"
    if needed > most:
        limit = "the model's context" if most < _MAX_LENGTH else "the most that is chosen unasked"
        told += f"; {most:,} is {limit}, and longer ones are left out"
    return rounded, told


def _lengths(recipe: Recipe, tokenizer: Tokenizer) -> list[int]:
    """The lengths of the chats as they are trained, rising; none where the data is text."""
    from mule import progress
    from mule.data.chat import render_examples
    from mule.data.prepare import read_options
    from mule.data.sources import Conversation, read

    found: list[int] = []
    items = islice(read(recipe.data.train, read_options(recipe.data)), _MAX_MEASURED)
    with progress.task("Measuring the chats", unit="chats") as bar:
        while chats := [c for c in islice(items, _MEASURED_AT_ONCE) if isinstance(c, Conversation)]:
            for examples in render_examples(tokenizer, chats):
                found += [len(example.ids) - 1 for example in examples]  # the last is a target only
            bar.advance(len(chats))
    return sorted(found)
