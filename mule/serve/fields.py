"""The fields of a request, each with its kind and range; no other is taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mule.config.hints import near
from mule.data.sources.row import type_name
from mule.serve.problem import Problem, shown

_MAX_NAME = 64  # characters of an unknown field that are compared with known ones


class Fields:
    """A JSON object read field by field; null is the same as absent."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def raw(self, name: str) -> Any:
        """The value as it came, or None."""
        return self._values.get(name)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`."""
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, f"is {shown(value)}, not a whole number")
        if not low <= value <= high:
            raise self.wrong(name, f"is {shown(value)}; it must be from {low:,} to {high:,}")
        return value

    def number(
        self, name: str, low: float, high: float, *, beyond_low: bool = False
    ) -> float | None:
        """A number from `low` to `high`; with `beyond_low` above `low`."""
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, f"is {shown(value)}, not a number")
        if not low <= value <= high or (beyond_low and value == low):  # neither nan nor inf is
            first = f"above {low:g}" if beyond_low else f"from {low:g}"
            raise self.wrong(name, f"is {shown(value)}; it must be {first} to {high:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false; false if absent."""
        value = self._values.get(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, f"is {shown(value)}; it must be true or false")
        return value

    def text(self, name: str, max_chars: int) -> str | None:
        """A string of so many characters at most."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, f"is {type_name(value)}, not a string")
        if len(value) > max_chars:
            raise self.wrong(name, f"has {len(value):,} characters; at most {max_chars:,} are read")
        return value

    def group(self, name: str) -> Fields | None:
        """An object, to be read in the same way."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, f"is {type_name(value)}, not an object")
        return Fields(value, f"{self._where}{name}.")

    def wrong(self, name: str, what: str) -> Problem:
        """The refusal of one field."""
        return Problem(400, f"{self._where}{name} {what}", param=f"{self._where}{name}")

    def allow(self, known: Iterable[str], refused: dict[str, str] | None = None) -> None:
        """Problem 400 for a field that is not `known`; `refused` says why some are not."""
        known = tuple(known)
        for name in self._values:
            if name in known:
                continue
            if refused and name in refused:
                raise self.wrong(name, f"is not taken: {refused[name]}")
            guess = near(name[:_MAX_NAME], known)
            hint = f"; did you mean {guess}?" if guess else "; docs/serve.md lists what is"
            raise Problem(
                400,
                f"{self._where}{shown(name)} is no field that is read here{hint}",
                param=f"{self._where}{name}"[:100],
                code="unknown_field",
            )
