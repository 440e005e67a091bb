"""`mule plan --check`: the parts of the run are built, and its fullest micro-batch is tried."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mule.errors import UserError


def run(
    recipe_file: Path | None,
    overrides: list[str],
    found: dict[str, Any],
    *,
    root: Path = Path("runs"),
    machine: str | None = None,
) -> dict[str, Any]:
    """What trying found, beside what `mule plan` (`found`) expected; the run's folder is removed.

    The rows that this prepares stay, for the run.
    """
    if machine is not None:
        raise UserError(
            f"--check tries the run here, and --machine {machine} is another machine",
            "leave one of the two out",
        )
    if "verdict" not in found:
        raise UserError(
            "--check tries one run, and a campaign is many", "give a recipe, or leave it out"
        )
    from mule.config.load import load_recipe
    from mule.run import Run
    from mule.train.assemble import assemble
    from mule.train.rehearsal import tried

    loaded = load_recipe(recipe_file, overrides)
    trial = Run.create(root, f"plan-check-{os.getpid()}", loaded.text)
    with trial.lock():
        try:
            parts = assemble(loaded.recipe, trial)
            told = tried(trial, parts, int(parts.recipe.train.micro_batch_rows))
        finally:
            trial.discard()
    return {"rehearsed": told.words, "rehearsed_bytes": told.peak_bytes}
