"""The result of a run as a file, and the table of a campaign."""

from __future__ import annotations

import statistics
from typing import Any

from mule import fsio
from mule.config.schema import Recipe
from mule.lab.campaign import Folder, Job, Plan
from mule.lab.training import trained_seconds, training_figures
from mule.run import Run

_SHAPE = (
    *("active_params", "active_params_without_embeddings", "total_params"),
    *("total_params_without_embeddings", "flops_per_token", "kv_bytes_per_token", "state_bytes"),
)


def result_of(job: Job, run: Run, recipe: Recipe, shape: dict[str, Any]) -> dict[str, Any]:
    """All figures of a finished run; `shape` is its row of `mule lab shapes`."""
    measured = fsio.read_json(run.folder / "held_out.json")
    rows = run.metrics()
    tokens = sum(row["num_targets"] for row in rows)
    return {
        "variant": job.variant,
        "seed": job.seed,
        "size": job.size,
        "run": str(run.folder),
        "tokens": tokens,
        "tokens_given": round(tokens / len(rows) * measured["step"]),  # of refused updates too
        "steps": measured["step"],
        "seconds": trained_seconds(run),
        "shape": {key: shape[key] for key in _SHAPE},
        **{name: measured[name] for name in ("valid", "test") if name in measured},
        "train": training_figures(run),
        "learning_rate": recipe.optim.learning_rate,
        "weight_decay": recipe.optim.weight_decay,
    }


def table(folder: Folder, plan: Plan) -> list[dict[str, Any]]:
    """A row for each variant in each size: means and standard deviations over its seeds."""
    rows = []
    for shape in plan.shapes():
        jobs = [job for job in plan.jobs() if job.shape == shape.shape]
        found = [fsio.read_json(folder.result(job)) for job in jobs if folder.result(job).is_file()]
        row: dict[str, Any] = {"variant": shape.shape, "seeds": len(found)}
        if found:
            losses = [result["test"]["loss"] for result in found]
            speeds = [result["train"]["tokens_per_second"] for result in found]
            row |= {
                "valid_loss": statistics.fmean(result["valid"]["loss"] for result in found),
                "test_loss": statistics.fmean(losses),
                "test_std": statistics.stdev(losses) if len(losses) > 1 else None,
                "tokens_per_second": statistics.median(speeds),
            }
        rows.append(row)
    return rows
