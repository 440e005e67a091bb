"""Conversions that the tables of several tools share. Each may return None: the value says nothing."""

from __future__ import annotations

import re
from typing import Any

from mule.compare.dialects.foreign_setup import MOST


def number(value: Any) -> Any:
    """A number; texts such as "2e-5", which YAML 1.1 leaves as text, too."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
        value = int(value) if abs(value) < MOST and value.is_integer() and value else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) <= MOST else None


def whole(value: Any) -> Any:
    """A whole number above 0; a share (0.1) or -1 says nothing."""
    value = number(value)
    if value is None or value < 1 or value != int(value):
        return None
    return int(value)


def above_zero(value: Any) -> Any:
    """A number above 0, else None: -1 is how transformers writes "not set"."""
    value = number(value)
    return None if value is None or (value < 0) else value


def truth(value: Any) -> Any:
    """True or false; "auto" stays what it is."""
    if isinstance(value, str):
        return {"true": True, "false": False, "auto": "auto"}.get(value.lower())
    return value


def words(value: Any) -> Any:
    """A list of texts: of a list, or of text with commas."""
    if value is None or value is False:
        return None
    items = value if isinstance(value, list) else str(value).split(",")
    return [str(item).strip() for item in items if str(item).strip()] or None


def run_name(value: Any) -> Any:
    """A name for the run's folder: the last parts of an output folder that say something."""
    if not isinstance(value, str):
        return None
    usual = {"", ".", "out", "output", "outputs", "saves", "data", "models", "adapters"}
    usual |= {"finetune", "pretrain"}
    parts = [part for part in re.split(r"[/\\]+", value) if part not in usual]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts[-3:])).strip("-._")
    return name[:100] or None


def modules(value: Any) -> Any:
    """The names of LoRA's targets as PEFT matches them: the last part of each."""
    if isinstance(value, str) and value in ("all", "all-linear"):
        return "all-linear"
    found = words(value)
    if found is None:
        return None
    if found == ["all"] or found == ["all-linear"]:
        return "all-linear"
    return list(dict.fromkeys(name.rpartition(".")[2] for name in found))
