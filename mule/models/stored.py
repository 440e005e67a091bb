"""What a model's files call its weights, where that is not what the modules call them.

A family file says so with `stored_names`: a weight of ours by the name or names that hold it. Several
names are the parts of one weight, one after another along its rows, as a mixture's experts. One that
defines `null_weights` has weights in its files that the model does not have, all zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from mule.models.config import ModelConfig
from mule.models.families import family


class Place(NamedTuple):
    """Where a stored tensor belongs: part `index` of `count` of the weight `name`."""

    name: str
    index: int = 0
    count: int = 1

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The view of a weight that a stored tensor fills."""
        if self.count == 1:
            return weight
        return weight.view(self.count, -1, weight.shape[-1])[self.index]


def null_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of weights that a model's files hold and that are all zeros, by their names there."""
    say = getattr(family(config.family), "null_weights", None)
    return say(config) if say else {}


def null_params(config: ModelConfig) -> int:
    """How many numbers these are: in the files only, and no part of the model."""
    return sum(math.prod(shape) for shape in null_weights(config).values())


class Names:
    """The two names of every weight of a model; where nothing is said, they are the same.

    `null` are the shapes of what only files hold: the null attention layer (families/_null.py).
    """

    def __init__(self, config: ModelConfig) -> None:
        say = getattr(family(config.family), "stored_names", None)
        self._parts: Mapping[str, tuple[str, ...]] = say(config) if say else {}
        self.null = null_weights(config)
        self._places = {
            stored: Place(name, index, len(parts))
            for name, parts in self._parts.items()
            for index, stored in enumerate(parts)
        }

    def parts(self, name: str) -> tuple[str, ...]:
        """What the files call the parts of a weight of ours."""
        return self._parts.get(name, (name,))

    def place(self, stored: str) -> Place:
        """The weight that a stored tensor belongs to."""
        return self._places.get(stored, Place(stored))

    def stored(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict by the names in files."""
        return {
            stored: Place(name, index, len(self.parts(name))).of(tensor)
            for name, tensor in state.items()
            for index, stored in enumerate(self.parts(name))
        }

    def all_stored(self, names: Iterable[str]) -> set[str]:
        """What the files of a model with these weights hold."""
        return {stored for name in names for stored in self.parts(name)}
