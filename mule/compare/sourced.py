"""A setup: what a model was trained with, each value with where it is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mule.compare.parameters import BY_KEY
from mule.doctor.history import Kind as Kind

Origin = Literal["published", "described", "recipe", "run"]


@dataclass(frozen=True)
class Value:
    """A value with its source; `rests_on` says on what, where the source itself was not read."""

    value: Any
    source: str
    note: str = ""
    checked: bool = True
    rests_on: str = ""


@dataclass(frozen=True)
class Setup:
    """A published setup, a described one, a recipe or a run, in the same words.

    `hearsay` is what is said of it elsewhere, and how it is: (said, so).
    """

    name: str
    title: str
    kind: Kind
    origin: Origin
    values: Mapping[str, Value]
    hearsay: tuple[tuple[str, str], ...] = field(default=())

    def get(self, key: str) -> Any:
        """The value, None where it is not known."""
        found = self.values.get(key)
        return None if found is None else found.value

    def number(self, key: str) -> float | None:
        value = self.get(key)
        return float(value) if isinstance(value, (int, float)) else None

    def shown(self, key: str) -> str:
        """The value as text, empty where it is not known; a ? follows what was not checked."""
        found = self.values.get(key)
        if found is None:
            return ""
        return BY_KEY[key].show(found.value) + ("" if found.checked else " ?")
