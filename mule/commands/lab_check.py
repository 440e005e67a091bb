"""`mule lab check FILE.py:Class`: what a module of the user's can do, and what to change in it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mule.errors import UserError

_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


def run(module: str, words: list[str], *, limit_s: float = 300.0) -> dict[str, Any]:
    """Build the module from `words` (key=value) in a child process and examine it.

    `limit_s` seconds are given to each check. `ok` is false when something must be changed.
    """
    from mule.lab.inspect import examine

    file, name = _named(module)
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


def _named(module: str) -> tuple[Path, str]:
    path, separator, name = module.rpartition(":")
    file = Path(path if separator else module)
    if file.suffix != ".py" or not file.is_file():
        raise UserError(
            f"{file}: no such Python file", "give a file and a class: mule lab check model.py:GPT"
        )
    if not separator or not name:
        classes = _classes(file)
        shown = ", ".join(classes) or "none"
        raise UserError(
            f"{file}: which class? It defines {shown}",
            f"name it behind a colon: mule lab check {file}:{classes[-1] if classes else 'CLASS'}",
        )
    return file, name


def _classes(file: Path) -> list[str]:
    """The classes of a file that derive from something."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]


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
