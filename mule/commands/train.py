"""`mule train`: a recipe in, a run folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule.errors import UserError


def run(
    recipe_file: Path | None,
    overrides: list[str],
    *,
    resume: bool = False,
    name: str | None = None,
    root: Path = Path("runs"),
) -> dict[str, Any]:
    """Train what the recipe says, in `root`/`name`; the summary of the run."""
    from mule.config.load import load_recipe
    from mule.run import Run
    from mule.train.assemble import assemble
    from mule.train.loop import fit

    if recipe_file is None and not resume:
        raise UserError("no recipe given", "mule train RECIPE.yaml, or see: mule recipe list")
    loaded = load_recipe(recipe_file, overrides)
    if not loaded.recipe.data.train:
        raise UserError("data.train is empty", "name the files to train on: data.train=[FILE]")
    run_name = name or loaded.recipe.name or (recipe_file or Path("run")).stem
    folder = root / run_name
    existing = resume and folder.exists()
    target = Run.open(folder) if existing else Run.create(root, run_name, loaded.text)
    with target.lock():
        parts = assemble(loaded.recipe, target)
        _record(target, parts)
        summary = fit(target, parts)
        target.log_event("finished", step=summary["steps"], val_loss=summary["val_loss"])
        target.sync()
    return summary | {
        "next": _next(
            str(folder), chat=parts.train.shards.kind == "chat", adapter=bool(parts.base[1])
        )
    }


def _record(run: Any, parts: Any) -> None:
    """Write the resolved recipe with its reasons, the lineage and the probes."""
    import torch

    import mule
    from mule import machine
    from mule.config.load import to_yaml

    resolved = parts.resolved
    run.write_resolved(to_yaml(resolved.recipe, resolved.reasons))
    _, identity = parts.base
    run.write_lineage(
        {
            "mule": mule.__version__,
            "torch": torch.__version__,
            "machine": machine.describe(),
            "recipe": parts.identity,
            "data": parts.train.shards.folder.name,
            "sources": parts.train.shards.index["sources"],
            "kind": parts.train.shards.kind,
            "tokenizer": parts.tokenizer.fingerprint(),
            "base": {"path": parts.recipe.model.path, "sha256": identity or None},
        }
    )


def _next(folder: str, *, chat: bool, adapter: bool) -> str:
    if adapter:
        return f"mule merge {folder}"
    return f"mule chat {folder}" if chat else f"mule chat {folder} --prompt 'Once upon a time'"
