"""mule recipe: the recipes that come with Mule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule.config.hints import near
from mule.config.presets import preset_file, presets
from mule.errors import UserError


def list_recipes() -> dict[str, Any]:
    """Name, file and first comment line of each recipe."""
    rows = [
        {"name": name, "about": _about(file), "file": str(file)} for name, file in presets().items()
    ]
    return {"recipes": rows, "next": f"mule recipe show {rows[0]['name']}" if rows else "mule init"}


def show(name: str) -> dict[str, Any]:
    """The text of a recipe, by its name or file; UserError names the nearest."""
    file = preset_file(name) or Path(name)
    if not file.is_file():
        match = near(name, presets())
        hint = f"did you mean `{match}`?" if match else "`mule recipe list` shows them"
        raise UserError(f"no recipe called `{name}` comes with Mule", hint)
    text = file.read_text(encoding="utf-8")
    return {"name": name, "file": str(file), "text": text, "next": f"mule train {name}"}


def _about(file: Path) -> str:
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
