"""`mule recipe import`: another tool's settings become a recipe, with everything that differs said."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import fsio
from mule.errors import UserError

if TYPE_CHECKING:
    from mule.compare.import_recipe import Imported


def run(
    file: Path,
    *,
    told: str | None = None,
    out: Path | None = None,
    devices: int | None = None,
    model: str | None = None,
    data: list[str] | None = None,
) -> dict[str, Any]:
    """Translate `file`, and write the recipe to `out` where one is given.

    `devices` is what it ran on there; `model` and `data` go before what the file names. The rows are
    the settings beside ours; then traps, losses and suspected mistakes. Raises UserError when `out`
    exists, or the file is no tool's that can be read.
    """
    from mule.compare.import_recipe import Overrides, import_file

    if out is not None and out.exists():
        raise UserError(f"{out} exists", "choose another --out, or remove it")
    found = import_file(file, told, Overrides(devices, model, data or []))
    if out is not None:
        with fsio.atomic_file(out) as stream:
            stream.write(found.text.encode())
    return _told(found, file, out)


def _told(found: Imported, file: Path, out: Path | None) -> dict[str, Any]:
    dialect, setup = found.detected.dialect, found.setup
    words = ["mule", "plan", str(out)]
    if out is None:
        words = ["mule", "recipe", "import", str(file), "--out", "recipe.yaml"]
    return {
        "file": str(file),
        "tool": dialect.title,
        "version": dialect.version,
        "confidence": found.detected.confidence,
        "signs": list(found.detected.signs),
        "rows": [asdict(row) for row in found.rows],
        "traps": [asdict(trap) for trap in found.traps],
        "losses": [
            {"key": one.key, "line": one.line, "happens": one.happens} for one in setup.lost
        ],
        "mistakes": [asdict(mistake) for mistake in found.mistakes],
        "left_to_mule": setup.left["speed"],
        "left_out": setup.left["report"],
        "unknown": [{"key": one.key, "line": one.line} for one in setup.unknown],
        "recipe": found.text,
        "out": str(out) if out is not None else None,
        "next": shlex.join(words),
    }
