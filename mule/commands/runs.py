"""mule runs: what is in the run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule.config.dump import read_reasons
from mule.plan.killed import killed_in_words
from mule.run import RUNS, Run
from mule.run import list_runs as runs_in

_FIGURES = ("loss", "val_loss", "val_perplexity", "tokens_per_second", "share_of_peak")


def list_runs(root: Path = RUNS) -> dict[str, Any]:
    """One entry for each run below `root`, the one written last first."""
    rows = [_summary(run) for run in runs_in(root)]
    rows.sort(key=lambda row: row["updated_at"] or 0, reverse=True)
    following = f"mule runs show {rows[0]['run']}" if rows else "mule train RECIPE"
    return {"root": str(root), "runs": rows, "next": following}


def show(run: str, root: Path = RUNS) -> dict[str, Any]:
    """Everything about one run: state, figures, checkpoints, lineage, and the reasons."""
    opened = Run.open(run, root)
    resolved = opened.folder / "resolved.yaml"
    reasons = read_reasons(resolved.read_text(encoding="utf-8")) if resolved.exists() else {}
    summary, killed = _summary(opened), opened.killed_after()
    return {
        **summary,
        "folder": str(opened.folder),
        "note": killed_in_words(killed) if summary["state"] == "killed" and killed else None,
        "devices": _devices(opened),
        "checkpoints": [{"step": step, "folder": p.name} for step, p in opened.checkpoints()],
        "latest": opened.latest(),
        "best": opened.best(),
        "sources": _validation_by(opened.metrics(), "val_loss_by", "source"),
        "categories": _validation_by(opened.metrics(), "val_loss_by_category", "category"),
        "lineage": opened.read_lineage(),
        "reasons": reasons,
        "events": _last_events(opened),
        "next": _following(opened, summary["state"]),
    }


def _summary(run: Run) -> dict[str, Any]:
    rows = run.metrics()
    last = _last_figures(rows)
    return {
        "run": run.name,
        "state": _state(run),
        "attempts": run.attempt,
        "steps": rows[-1]["step"] if rows else 0,
        "epoch": rows[-1].get("epoch") if rows else None,
        **last,
        "updated_at": rows[-1]["at"] if rows else None,
    }


def _state(run: Run) -> str:
    state = run.state()
    return "killed" if state == "interrupted" and run.killed_after() else state


def _devices(run: Run) -> list[dict[str, Any]]:
    """What each process last said of its device's memory."""
    return next((row["devices"] for row in reversed(run.metrics()) if "devices" in row), [])


def _last_events(run: Run) -> list[dict[str, Any]]:
    events = [event for event in run.events() if event["kind"] != "started"]
    return [{k: v for k, v in event.items() if k != "devices"} for event in events[-10:]]


def _last_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest value of each figure; validation is not in every row."""
    return {
        name: next((row[name] for row in reversed(rows) if row.get(name) is not None), None)
        for name in _FIGURES
    }


def _validation_by(rows: list[dict[str, Any]], key: str, what: str) -> list[dict[str, Any]]:
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


def _following(run: Run, state: str) -> str:
    if state in ("interrupted", "killed", "failed", "new"):
        return f"mule train {run.folder / 'recipe.yaml'} --resume"
    return f"mule runs show {run.name}" if state == "running" else f"mule chat {run.folder}"
