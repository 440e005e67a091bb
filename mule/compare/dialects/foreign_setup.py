"""A setup as another tool's file gives it: facts by name, each with the key it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mule.compare.dialects.table import Given

MOST = 1e18  # larger numbers (and what is none) say nothing, and would overflow


@dataclass(frozen=True)
class Fact:
    """A value and where it came from; `key` is "" for what the tool assumes."""

    name: str
    value: Any
    key: str = ""
    line: int | None = None
    typed: Any = None
    note: str = ""

    @property
    def is_stated(self) -> bool:
        return bool(self.key)


@dataclass(frozen=True)
class Lost:
    """A setting with no equivalent, and what happens instead."""

    key: str
    value: Any
    happens: str
    line: int | None = None


@dataclass
class ForeignSetup:
    """What is known of a setup. `title` is the tool's name; `given` every setting of the file."""

    dialect: str
    title: str
    file: str
    given: dict[str, Given] = field(default_factory=dict)
    facts: dict[str, Fact] = field(default_factory=dict)
    lost: list[Lost] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=lambda: {"speed": [], "report": []})
    unknown: list[Given] = field(default_factory=list)

    def value(self, name: str, default: Any = None) -> Any:
        """The value of a fact, `default` where it is unknown."""
        found = self.facts.get(name)
        return default if found is None or found.value is None else found.value

    def number(self, name: str) -> float | None:
        """The value of a fact when it is a number."""
        value = self.value(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        return float(value) if abs(value) <= MOST else None

    def is_stated(self, name: str) -> bool:
        """Whether the file itself says it."""
        return name in self.facts and self.facts[name].is_stated

    def place(self, name: str) -> str:
        """Where a fact stands: `file:12: lora_r`, or whose default it is."""
        found = self.facts.get(name)
        if found is None or not found.is_stated:
            return f"{self.title}'s default"
        line = f":{found.line}" if found.line else ""
        return f"{self.file}{line}: {found.key}"

    def source(self, name: str) -> Given | None:
        """The setting of the file that a fact came from."""
        found = self.facts.get(name)
        return self.given.get(found.key) if found is not None else None

    def put(self, name: str, value: Any, given: Given | None = None, *, note: str = "") -> None:
        """Add a fact; `given` is the setting that it came from."""
        if given is None:
            self.facts[name] = Fact(name, value, note=note)
        else:
            self.facts[name] = Fact(name, value, given.key, given.line, given.value, note)

    def lose(self, given: Given, happens: str) -> None:
        """Note a setting that has no equivalent."""
        self.lost.append(Lost(given.key, given.value, happens, given.line))

    def raw(self, key: str, default: Any = None) -> Any:
        """The value of a key as the file has it."""
        found = self.given.get(key)
        return default if found is None or found.value is None else found.value
