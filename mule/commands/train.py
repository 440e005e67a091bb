"""`mule train`: a recipe in, a run folder out."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.commands.assume import Assumed, assumptions, name_of, tell
from mule.errors import Interrupted, MuleError, UserError

if TYPE_CHECKING:
    from mule.config.schema import Recipe
    from mule.run import Run
    from mule.train.assemble import Parts
    from mule.train.distributed import Group
    from mule.train.model import Maker

_CURVES_FROM_S = 60


def run(
    recipe_file: Path | None,
    overrides: list[str],
    *,
    resume: bool = False,
    name: str | None = None,
    root: Path = Path("runs"),
    assume: bool = False,
    maker: Maker | None = None,
) -> dict[str, Any]:
    """Train what the recipe says, in `root`/`name`; the summary of the run.

    With `assume` there is no recipe: what the overrides leave open about a model and its data is
    assumed and told, and the run's recipe.yaml says all of it. A `maker` makes the model in place of
    Mule.
    """
    from mule.config.load import load_recipe
    from mule.run import Run
    from mule.train.distributed import joined

    with joined() as group:
        if assume:
            name = name or name_of(overrides)
        known = _known_run(recipe_file, name, root) if resume else None
        given = known.folder / "recipe.yaml" if known else None
        if known and (assume or recipe_file == given):
            resolved = known.folder / "resolved.yaml"  # as it was run, with its overrides
            recipe_file = resolved if resolved.is_file() else known.folder / "recipe.yaml"
        is_open = assume and recipe_file is None
        assumed = group.from_first(lambda: _assumed(overrides, name or "")) if is_open else None
        loaded = load_recipe(recipe_file, overrides, assumed=assumed)
        run_name = name or loaded.recipe.name or (recipe_file.stem if recipe_file else "run")
        if known is None and resume and (root / run_name / "recipe.yaml").is_file():
            known = Run.open(root / run_name)
        folder = known.folder if known else root / run_name
        group.connect(loaded.recipe.train.device)
        target = _target(known, folder, loaded.text, group)
        summary = _train(target, loaded.recipe, group, maker, is_new=known is None)
    if not group.is_first:
        raise SystemExit(0)  # the first process shows the result
    return summary


def _assumed(overrides: list[str], name: str) -> Assumed:
    """What is assumed beside the overrides, told to the user."""
    assumed = assumptions(overrides, name)
    tell(assumed)
    return assumed


def _target(known: Run | None, folder: Path, text: str, group: Group) -> Run:
    """The run to train in; made by the first process, and only read by the others."""
    from mule.run import Run
    from mule.train.onlooker import Onlooker

    if group.is_first and known is None:
        known = Run.create(folder.parent, folder.name, text)
    return known if known and group.is_first else Onlooker(folder)


def _train(
    run: Run, recipe: Recipe, group: Group, maker: Maker | None, *, is_new: bool
) -> dict[str, Any]:
    """Train in the folder of `run`, which is kept once an update was begun."""
    from mule.train.assemble import assemble
    from mule.train.loop import fit

    with run.lock():
        try:
            with group.explained():
                parts = assemble(recipe, run, group, maker)
                group.from_first(lambda: _record(run, parts))
                summary = fit(run, parts)
        except MuleError as error:
            if is_new and run.attempt == 0:
                run.discard()  # refused before the first update: the name stays free
            elif not isinstance(error, Interrupted):
                _record_failure(run, error)
            raise
        ended = {key: summary[key] for key in ("val_loss", "devices")}
        run.log_event("finished", step=summary["steps"], **ended)
        run.sync()
        if group.is_first:
            _report(run)
    chat = parts.train.shards.kind == "chat"
    return summary | {"next": _next(run.folder, chat=chat, adapter=bool(parts.base[1]))}


def _record(run: Run, parts: Parts) -> None:
    """Write the resolved recipe with its reasons, the lineage, the probes and the facts."""
    import torch

    import mule
    from mule import fsio, machine
    from mule.config.load import to_yaml
    from mule.data.probe import held_out_sample
    from mule.train.facts import record_facts

    resolved = parts.resolved
    _refuse_changes(run, resolved.recipe)
    reasons = _reasons_before(run) | resolved.reasons
    if parts.asked_revision:
        model = parts.recipe.model.path
        reasons["model.revision"] = f"{parts.asked_revision} of {model} when the run began"
    run.write_resolved(to_yaml(resolved.recipe, reasons))
    if not (run.folder / "probe.json").is_file():
        sample = held_out_sample(resolved.recipe.data, resolved.recipe.train.seed, parts.tokenizer)
        fsio.write_json(run.folder / "probe.json", sample)
    record_facts(run, parts)
    base_dir, identity = parts.base
    manifest = base_dir / fsio.MANIFEST  # of a checkpoint: chains this run to the one before
    base = {
        "path": parts.recipe.model.path,
        "revision": parts.recipe.model.revision,
        "revision_asked": parts.asked_revision,
        "sha256": identity or None,
        "manifest_sha256": fsio.sha256_file(manifest) if manifest.is_file() else None,
    }
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
            "base": base,
            "warm_start": parts.warm_start or None,
        }
    )


def _reasons_before(run: Run) -> dict[str, str]:
    """Why the settings were chosen when the run began; a resumed run finds them given."""
    from mule.config.dump import read_reasons

    file = run.folder / "resolved.yaml"
    found = read_reasons(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {key: entry["reason"] for key, entry in found.items()}


def _report(run: Run) -> None:
    """Write report.md; drawing takes a second, for which a run of under a minute does not wait."""
    from mule import progress
    from mule.commands.report import write_report

    began = next(event["at"] for event in reversed(run.events()) if event["kind"] == "started")
    try:
        write_report(run, curves=time.time() - began >= _CURVES_FROM_S)
    except Exception as error:  # the run is finished and saved, whatever became of its report
        cause = f"{type(error).__name__}: {error}"
        told = f"no report was written ({cause}); again: mule doctor {run.folder} --report"
        progress.note(told, "warning")


def _record_failure(run: Run, error: MuleError) -> None:
    """Log the cause, and say how to go on when the disk was the cause."""
    from mule.errors import StorageError

    if isinstance(error, StorageError):
        error.hint += f"; go on with: mule train {run.folder}/recipe.yaml --resume"
    with contextlib.suppress(StorageError):  # the disk may be full: the cause is on the screen
        run.log_event("failed", cause=error.message)


def _known_run(recipe_file: Path | None, name: str | None, root: Path) -> Run | None:
    """The run to go on with: the one whose own recipe was given, or the one of this name."""
    from mule.run import Run

    for folder in (recipe_file.parent if recipe_file else None, root / name if name else None):
        if folder is not None and (folder / "recipe.yaml").is_file() and _is_run(folder, root):
            return Run.open(folder)
    return None


def _is_run(folder: Path, root: Path) -> bool:
    """Whether a folder with a recipe.yaml is a run, and not where somebody keeps a recipe."""
    return (folder / "run.lock").is_file() or folder.resolve().parent == root.resolve()


def _refuse_changes(run: Run, recipe: Recipe) -> None:
    """On resume, UserError naming each setting that would change what is learned."""
    from mule.config.dump import identity_values
    from mule.config.load import load_recipe

    file = run.folder / "resolved.yaml"
    if not file.is_file():
        return
    before = identity_values(load_recipe(file, []).recipe)
    now = identity_values(recipe)
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        words = ", ".join(f"{key} (was {before.get(key)!r}, is {now[key]!r})" for key in changed)
        raise UserError(
            f"{run.folder}: cannot resume with another recipe: {words}",
            "put the old values back, or start a new run: --name ANOTHER, with "
            f"model.path={run.folder} to start from these weights",
        )


def _next(folder: Path, *, chat: bool, adapter: bool) -> str:
    if adapter:
        return f"mule merge {folder}"
    return f"mule chat {folder}" if chat else f"mule chat {folder} --prompt 'Once upon a time'"
