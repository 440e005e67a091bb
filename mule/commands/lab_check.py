"""`mule lab check FILE.py:Class`: what a module of the user's can do, and what to change in it."""

from __future__ import annotations

import ast
from typing import Any

from mule.errors import UserError

_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


def run(module: str, words: list[str], *, limit_s: float = 300.0) -> dict[str, Any]:
    """Build the module from `words` (key=value) in a child process and examine it.

    `limit_s` seconds are given to each check. `ok` is false when something must be changed.
    """
    from mule.lab.inspect import examine
    from mule.lab.inspect_source import named_class

    file, name = named_class(module)
    settings = dict(_setting(word) for word in words)
    found = examine(file, name, settings, limit_s=limit_s)
    built = next((one for one in found["findings"] if one["check"] == "build"), None)
    if built is not None and built["found"].find(" cannot be built without ") > 0:
        typed = "".join(f" {word}" for word in words)
        raise UserError(
            f"{module}: {built['found']}",
            f"give them, for example: mule lab check {module}{typed} {built['change']}",
        )
    counts = {
        level: sum(one["level"] == level for one in found["findings"])
        for level in ("fault", "warning", "note")
    }
    return {
        "module": module,
        "settings": settings,
        "ok": counts["fault"] == 0,
        "verdict": _verdict(counts),
        **found,
    }


def _setting(word: str) -> tuple[str, Any]:
    name, separator, text = word.partition("=")
    if not separator or not name:
        raise UserError(
            f"`{word}` is no setting", "settings are written key=value, such as n_layer=2"
        )
    if text.lower() in _CONSTANTS:
        return name, _CONSTANTS[text.lower()]
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text


def _verdict(counts: dict[str, int]) -> str:
    if counts["fault"]:
        return "FIX FIRST"
    return "FIT FOR A CAMPAIGN" if not counts["warning"] else "WORKS, WITH WARNINGS"
