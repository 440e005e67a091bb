"""mule runs: what is in the run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mule import logs
from mule.commands.run_files import Kept, settings_of
from mule.config.dump import read_reasons
from mule.plan.killed import killed_in_words
from mule.run import RUNS, Run
from mule.run import list_runs as runs_in

_FIGURES = ("loss", "val_loss", "val_perplexity", "tokens_per_second", "share_of_peak")
_TAIL_BYTES = 32 * 1024  # of a log: some hundred updates
_ADAPTERS = {"lora": "LoRA", "qlora": "QLoRA"}


def summaries() -> Kept[dict[str, Any]]:
    """Keeps what `list_runs` says of each run until its files change: for who asks again."""
    return Kept(summary)


def list_runs(root: Path = RUNS, kept: Kept[dict[str, Any]] | None = None) -> dict[str, Any]:
    """One entry for each run below `root`, the one written last first."""
    known = kept or summaries()
    rows = [known.of(run) for run in runs_in(root)]
    rows.sort(key=lambda row: row["updated_at"], reverse=True)
    following = f"mule runs show {rows[0]['run']}" if rows else "mule train RECIPE"
    return {"root": str(root), "runs": rows, "next": following}


def show(run: str, root: Path = RUNS) -> dict[str, Any]:
    """Everything about one run: state, figures, checkpoints, lineage, and the reasons."""
    opened = Run.open(run, root)
    resolved = opened.folder / "resolved.yaml"
    reasons = read_reasons(resolved.read_text(encoding="utf-8")) if resolved.exists() else {}
    rows = opened.metrics()
    return {
        **summary(opened),
        "folder": str(opened.folder),
        "devices": next((row["devices"] for row in reversed(rows) if "devices" in row), []),
        "checkpoints": [{"step": step, "folder": p.name} for step, p in opened.checkpoints()],
        "latest": opened.latest(),
        "best": opened.best(),
        "sources": _validation_by(rows, "val_loss_by", "source"),
        "categories": _validation_by(rows, "val_loss_by_category", "category"),
        "lineage": opened.read_lineage(),
        "reasons": reasons,
        "events": _last_events(opened),
        "next": following(opened),
    }


def following(run: Run) -> str:
    """The command that comes next."""
    state = run.state()
    if state in ("interrupted", "failed", "new"):
        return f"mule train {run.folder / 'recipe.yaml'} --resume"
    return f"mule runs watch {run.name}" if state == "running" else f"mule chat {run.folder}"


def files(run: Run) -> list[dict[str, Any]]:
    """What lies in the folder: name, size, when it changed; a folder counts as all that is in it."""
    return [_entry(path) for path in sorted(run.folder.iterdir()) if path.exists()]


# ---------------------------------------------------------------- one run


def summary(run: Run) -> dict[str, Any]:
    """The run in figures, from the ends of its logs: however long it is, that takes no time."""
    settings, events, state = settings_of(run), run.events(), run.state()
    rows = _last_rows(run, _number(settings, "evaluate.every_steps"))
    killed = run.killed_after(rows) if state == "interrupted" else None
    last = rows[-1] if rows else {"step": 0, "at": 0.0}
    changed_at = events[-1]["at"] if events else (run.folder / "recipe.yaml").stat().st_mtime
    num_steps = _number(settings, "train.steps") or None
    return {
        "run": run.name,
        "state": "killed" if killed else state,
        "stage": _stage(run, settings),
        "attempts": run.attempt,
        "steps": last["step"],
        "num_steps": num_steps,
        "epoch": last.get("epoch"),
        **_last_figures(rows),
        "left_s": _left_s(last, num_steps) if state == "running" else None,
        "updated_at": max(last["at"], changed_at),
        "note": killed_in_words(killed) if killed else None,
    }


def _value(settings: dict[str, dict[str, str]], key: str) -> str | None:
    return settings[key]["value"] if key in settings else None


def _number(settings: dict[str, dict[str, str]], key: str) -> int:
    """A whole number of the settings; 0 where there is none."""
    text = _value(settings, key) or ""
    return int(text) if text.isdigit() else 0


def _stage(run: Run, settings: dict[str, dict[str, str]]) -> str | None:
    """Which part of a model's life the run is; None before its recipe is resolved."""
    if not settings:
        return None
    adapter = _value(settings, "adapter.kind")
    if adapter in _ADAPTERS:
        return _ADAPTERS[adapter]
    if "model.path" not in settings:
        return "pretrain"
    return "SFT" if run.read_lineage().get("kind") == "chat" else "continued pretraining"


def _left_s(last: dict[str, Any], num_steps: int | None) -> float | None:
    """Seconds until the last update, at the pace of the newest ones."""
    pace = last.get("steps_per_second")
    return max(0, num_steps - last["step"]) / pace if num_steps and pace else None


def _last_rows(run: Run, every_steps: int) -> list[dict[str, Any]]:
    """The newest rows: as many as tell each figure, those of an evaluation too where there was one."""
    file = run.folder / "metrics.jsonl"
    size = file.stat().st_size if file.is_file() else 0
    wanted = _TAIL_BYTES
    while True:
        rows = run.standing(logs.read_log_from(file, max(0, size - wanted))[0])
        is_told = rows and None not in _last_figures(rows).values()
        spans = rows and every_steps and rows[-1]["step"] - rows[0]["step"] > every_steps
        if wanted >= size or is_told or spans:
            return rows
        wanted *= 4


def _last_events(run: Run) -> list[dict[str, Any]]:
    events = [event for event in run.events() if event["kind"] != "started"]
    return [{k: v for k, v in event.items() if k != "devices"} for event in events[-10:]]


def _last_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest value of each figure; validation is not in every row."""
    return {
        name: next((row[name] for row in reversed(rows) if row.get(name) is not None), None)
        for name in _FIGURES
    }


def _validation_by(rows: Sequence[dict[str, Any]], key: str, what: str) -> list[dict[str, Any]]:
    """The first and the newest validation loss of each source or category, where there are any."""
    found = [row[key] for row in rows if key in row]
    if not found:
        return []
    first, last = found[0], found[-1]
    changes = {name: loss - first[name] for name, loss in last.items() if name in first}
    return [
        {what: name, "first": first.get(name), "val_loss": loss, "change": changes.get(name)}
        for name, loss in last.items()  # a source may have been renamed between two attempts
    ]


def _entry(path: Path) -> dict[str, Any]:
    inside = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {
        "name": path.name + ("/" if path.is_dir() else ""),
        "size_bytes": sum(file.stat().st_size for file in inside),
        "files": len(inside),
        "changed_at": path.stat().st_mtime,
    }
