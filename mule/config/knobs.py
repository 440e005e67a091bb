"""The schema as a flat table: one entry a setting, for messages, documents and forms."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any, TypeGuard

from mule.config.schema import Recipe
from mule.config.section import Section


@dataclass(frozen=True)
class Knob:
    """One setting; `schema` is its fragment of the JSON Schema."""

    key: str
    schema: dict[str, Any]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def description(self) -> str:
        return self.schema["description"]

    @property
    def role(self) -> str:
        return self.schema["role"]

    @property
    def unit(self) -> str:
        return self.schema.get("unit", "")

    @property
    def default(self) -> Any:
        return self.schema.get("default")

    @property
    def branches(self) -> list[dict[str, Any]]:
        """The alternatives of its type, null left out."""
        return [b for b in self.schema.get("anyOf", [self.schema]) if b.get("type") != "null"]

    @property
    def choices(self) -> list[str]:
        """Every word it accepts, of itself or as an item of its list."""
        found: list[str] = []
        for branch in self.branches:
            found += _words(branch) + _words(branch.get("items", {}))
        return found

    @property
    def is_list(self) -> bool:
        """True when only a list is accepted."""
        return all(branch.get("type") == "array" for branch in self.branches)

    @property
    def is_map(self) -> bool:
        """True when it holds entries of its own, set as key.name=value."""
        return all(branch.get("type") == "object" for branch in self.branches)

    def expected(self) -> str:
        """What is accepted, in words: "a whole number of at least 1, or auto"."""
        form = self.schema.get("form")
        return form if form else ", or ".join(_in_words(branch) for branch in self.branches)

    def expected_item(self) -> str:
        """What is accepted as one item of its list, in words."""
        return next(_in_words(branch["items"]) for branch in self.branches if "items" in branch)


@functools.cache
def knobs() -> dict[str, Knob]:
    """Every setting by its dotted key, in the order of the schema."""
    return {knob.key: knob for knob in _walk(Recipe, "", Recipe.model_json_schema())}


@functools.cache
def sections() -> dict[str, type[Section]]:
    """Every section by its dotted name; "" is the whole recipe."""
    found: dict[str, type[Section]] = {"": Recipe}

    def walk(kind: type[Section], prefix: str) -> None:
        for name, field in kind.model_fields.items():
            if _is_section(field.annotation):
                found[prefix + name] = field.annotation
                walk(field.annotation, f"{prefix}{name}.")

    walk(Recipe, "")
    return found


def _walk(kind: type[Section], prefix: str, root: dict[str, Any]) -> list[Knob]:
    found: list[Knob] = []
    properties = (
        root["properties"] if kind is Recipe else root["$defs"][kind.__name__]["properties"]
    )
    for name, field in kind.model_fields.items():
        if _is_section(field.annotation):
            found += _walk(field.annotation, f"{prefix}{name}.", root)
        else:
            found.append(Knob(prefix + name, properties[name]))
    return found


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _words(branch: dict[str, Any]) -> list[str]:
    return list(branch.get("enum", [branch["const"]] if "const" in branch else []))


def _in_words(branch: dict[str, Any]) -> str:
    if words := _words(branch):
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    kind = branch["type"]
    if kind == "array":
        items = branch["items"]
        return "a list of " + (", ".join(_words(items)) if _words(items) else "texts")
    if kind == "object":
        return "entries of a name and a text"
    if kind in ("integer", "number"):
        noun = "a whole number" if kind == "integer" else "a number"
        return " ".join([noun, *_limits(branch)])
    return {"boolean": "true or false", "string": "text"}[kind]


def _limits(branch: dict[str, Any]) -> list[str]:
    names = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    found = [f"{words} {number(branch[name])}" for name, words in names.items() if name in branch]
    return [" and ".join(found)] if found else []


def number(value: float) -> str:
    """A number as one writes it in a recipe: 1_048_576, 0.0006, 1e-08."""
    if isinstance(value, int) or value.is_integer():
        return f"{int(value):_}" if abs(value) >= 10_000 else str(int(value))
    return json.dumps(value)
