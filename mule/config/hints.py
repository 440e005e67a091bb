"""What the user probably meant: near names for keys and values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from mule.config.aliases import ALIASES
from mule.config.knobs import Knob, knobs, number, sections


def near(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word most like `word`, None when none is."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return found[0] if found else None


def unknown_key(section: str, name: str) -> str:
    """What to say about a key that `section` does not have."""
    prefix = f"{section}." if section else ""
    known = [*knobs(), *(key for key in sections() if key)]
    here = [key.removeprefix(prefix) for key in known if key.startswith(prefix)]
    plain = name.lower().replace("-", "_")
    if ours := ALIASES.get(plain.rpartition(".")[2]):
        if " " in ours:
            return f"no such key; {ours}"
        if ours != prefix + name:
            return f"no such key; Mule calls it `{ours}`"
    if prefix + name in known:  # a dotted key written in one line of a file
        return f"no such key; write `{name.rpartition('.')[2]}` below `{name.rpartition('.')[0]}:`"
    for candidates in (here, _with_leaf(plain, known), known):
        if match := near(plain if candidates is here else prefix + plain, candidates, 0.65):
            return f"no such key; did you mean `{prefix + match if candidates is here else match}`?"
    return (
        f"no such key; {f'`{section}`' if section else 'a recipe'} has {', '.join(_firsts(here))}"
    )


def wrong_value(knob: Knob, value: Any, *, item: bool = False) -> str:
    """What to say about a value, or an item of a list, that the type of `knob` refuses."""
    said = f"expected {knob.expected_item() if item else knob.expected()}, found {_shown(value)}"
    if isinstance(value, str) and (match := near(value.lower(), knob.choices)):
        return f"{said}; did you mean `{match}`?"
    types = {branch.get("type") for branch in knob.branches}
    if types == {"integer"} and isinstance(value, float) and value.is_integer():
        return f"{said}; write {int(value):_}"
    if "array" in types and isinstance(value, str) and not item:
        return f"{said}; write [{value}]"
    if (item or "string" in types) and not knob.choices and isinstance(value, (int, float)):
        return f"{said}; put it in quotes"
    return said


def wrong_entry(value: Any) -> str:
    """What to say about an entry of a map that is no text."""
    return wrong_value(Knob("", {"type": "string"}), value)


def _with_leaf(name: str, known: list[str]) -> list[str]:
    return [key for key in known if key.rpartition(".")[2] == name]


def _firsts(keys: list[str]) -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in keys))


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "keys below it"
    text = value if len(value) <= 60 else f"{value[:57]}..."
    return f"`{text}`" if text else "empty text"
