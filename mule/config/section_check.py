"""A section outside the recipe, checked: every problem with its line in the file."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from ruamel.yaml.nodes import MappingNode, Node

from mule.config.hints import near, wrong_value
from mule.config.knobs import Knob
from mule.config.reader import line_of, mapping_items
from mule.config.section import Conflict, Section

Checked = TypeVar("Checked", bound=Section)


def checked(
    kind: type[Checked], values: dict[str, Any], places: Places
) -> tuple[Checked | None, list[str]]:
    """The section of the given values, or None and what is wrong with them."""
    try:
        return kind.model_validate(values), []
    except ValidationError as error:
        said: dict[str, None] = {}
        for detail in error.errors():
            for problem in _said(kind, dict(detail), values, places):
                said[problem] = None
        return None, list(said)


class Places:
    """Where each value stands: a line of the file, or a word of the command line.

    `whole` is what the file holds, as errors name it.
    """

    def __init__(
        self, source: str, node: Node | None, words: dict[str, str], whole: str = "a campaign"
    ) -> None:
        self.whole = whole
        self._source, self._node, self._words = source, node, words

    def of(self, loc: tuple[int | str, ...]) -> str:
        """`campaign.yaml:12: variants.gqa.num_kv_heads`; parts that are not in the file are skipped."""
        parts = [part for part in loc if not isinstance(part, int)]
        for end in range(len(parts), 0, -1):
            if word := self._words.get(".".join(map(str, parts[:end]))):
                return f"command line: {word}"
        line, known = self._line(loc)
        key = ".".join(known)
        place = f"{self._source}:{line}" if line else self._source
        return f"{place}: {key}" if key else place

    def _line(self, loc: tuple[int | str, ...]) -> tuple[int | None, list[str]]:
        node, line, known = self._node, None, []
        for part in loc:
            if isinstance(node, MappingNode):
                found = {key: (at, value) for key, at, value in mapping_items(node)}
                if str(part) in found:
                    line, node = found[str(part)]
                    known.append(str(part))
            elif isinstance(part, int) and node is not None and isinstance(node.value, list):
                node = node.value[part]
                line = line_of(node)
        return line, known or [str(part) for part in loc[:1]]


def _said(
    kind: type[Section], detail: dict[str, Any], values: dict[str, Any], places: Places
) -> list[str]:
    """One detail of a ValidationError, in words."""
    loc: tuple[int | str, ...] = detail["loc"]
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, Conflict):
        said = []
        for problem in cause.problems:
            key = (*loc, *problem.key.split("."))
            said.append(f"{places.of(key)}: {problem.message}")
        return said
    if detail["type"] == "extra_forbidden":
        owner, names = _fields(kind, loc[:-1], places.whole)
        match = near(str(loc[-1]).replace("-", "_"), names)
        told = f"did you mean `{match}`?" if match else f"{owner} has {', '.join(names)}"
        return [f"{places.of(loc)}: no such key; {told}"]
    if detail["type"] == "missing":
        return [f"{places.of(loc[:-1])}: {loc[-1]} is missing"]
    if loc[-1] == "[key]":
        knob = knob_at(kind, loc[:1])
        return [f"{places.of(loc[:-1])}: {wrong_value(knob, loc[-2])}"] if knob else []
    knob, item = knob_at(kind, loc), _item_in(kind, loc)
    if knob is None:
        return [f"{places.of(loc)}: {detail['msg']}"]
    value: Any = values
    at = loc[: len(loc) if item is None else item + 1]
    for part in at:
        value = value[part] if _holds(value, part) else value
    return [f"{places.of(at)}: {wrong_value(knob, value, item=item is not None)}"]


def _holds(value: Any, part: int | str) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _section_at(kind: type[Section], loc: tuple[int | str, ...]) -> tuple[type[Section], int]:
    """The section that `loc` leads to, and how many of its parts that took."""
    place = 0
    while place < len(loc):
        field = kind.model_fields.get(str(loc[place]))
        if field is None:
            break
        found, taken = _section_in(field.annotation)
        if found is None or place + taken > len(loc):
            break
        kind, place = found, place + taken
    return kind, place


def _section_in(annotation: Any) -> tuple[type[Section] | None, int]:
    """The section that a field holds, itself (1 part) or in a map of names (2 parts)."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            is_map = kind is not annotation and getattr(annotation, "__origin__", None) is dict
            return kind, 2 if is_map else 1
    return None, 0


def _fields(kind: type[Section], loc: tuple[int | str, ...], whole: str) -> tuple[str, list[str]]:
    owner, _ = _section_at(kind, loc)
    name = ".".join(map(str, loc))
    return (f"`{name}`" if name else whole), list(owner.model_fields)


def _item_in(kind: type[Section], loc: tuple[int | str, ...]) -> int | None:
    """Where in `loc` an item of a setting's list is named; None where none is."""
    _, place = _section_at(kind, loc)
    return next((i for i in range(place + 1, len(loc)) if isinstance(loc[i], int)), None)


def knob_at(kind: type[Section], loc: tuple[int | str, ...]) -> Knob | None:
    """The setting that `loc` leads to, or into; None where there is none, or it is a section."""
    owner, place = _section_at(kind, loc)
    if place >= len(loc) or str(loc[place]) not in owner.model_fields:
        return None
    schema = owner.model_json_schema()["properties"][str(loc[place])]
    is_plain = "$ref" not in str(schema) or "form" in schema
    return Knob(str(loc[place]), schema) if is_plain else None
