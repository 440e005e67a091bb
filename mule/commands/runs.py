"""mule runs: what is in the run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule.config.dump import read_reasons
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
    summary = _summary(opened)
    return {
        **summary,
        "folder": str(opened.folder),
        "checkpoints": [{"step": step, "folder": p.name} for step, p in opened.checkpoints()],
        "latest": opened.latest(),
        "best": opened.best(),
        "lineage": opened.read_lineage(),
        "reasons": reasons,
        "events": [event for event in opened.events() if event["kind"] != "started"][-10:],
        "next": _following(opened, summary["state"]),
    }


def _summary(run: Run) -> dict[str, Any]:
    rows = run.metrics()
    last = _last_figures(rows)
    return {
        "run": run.name,
        "state": run.state(),
        "attempts": run.attempt,
        "steps": rows[-1]["step"] if rows else 0,
        "epoch": rows[-1].get("epoch") if rows else None,
        **last,
        "updated_at": rows[-1]["at"] if rows else None,
    }


def _last_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest value of each figure; validation is not in every row."""
    return {
        name: next((row[name] for row in reversed(rows) if row.get(name) is not None), None)
        for name in _FIGURES
    }


def _following(run: Run, state: str) -> str:
    if state in ("interrupted", "failed", "new"):
        return f"mule train {run.folder / 'recipe.yaml'} --resume"
    return f"mule runs show {run.name}" if state == "running" else f"mule chat {run.folder}"
