"""The result of a run as a file, the rate that a search chose, and the table of a campaign."""

from __future__ import annotations

import statistics
from typing import Any

from mule import fsio
from mule.config.schema import Recipe
from mule.errors import CheckFailed
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
    return {
        "variant": job.variant,
        "seed": job.seed,
        "size": job.size,
        "run": str(run.folder),
        "tokens": sum(row["num_targets"] for row in rows),
        "steps": measured["step"],
        "seconds": trained_seconds(run),
        "shape": {key: shape[key] for key in _SHAPE},
        **{name: measured[name] for name in ("valid", "test") if name in measured},
        "train": training_figures(run),
        "learning_rate": recipe.optim.learning_rate,
    }


def chosen_rate(folder: Folder, plan: Plan, job: Job) -> float:
    """The learning rate with the lowest validation loss among the tries of the job's variant.

    The tries of all rates are written to search/<variant>.json.
    """
    tries = [other for other in plan.tries(job.variant) if other.shape == job.shape]
    found = [fsio.read_json(folder.result(t)) for t in tries if folder.result(t).is_file()]
    if not found:
        raise CheckFailed(
            f"{job.shape}: no try of its learning-rate search has ended",
            f"see {folder.path / 'logs'} for the causes; or set optim.learning_rate and remove search",
        )
    best = min(found, key=lambda row: row["valid"]["loss"])
    rows = [
        {
            "learning_rate": row["learning_rate"],
            "valid_loss": row["valid"]["loss"],
            "run": row["run"],
        }
        for row in found
    ]
    table = {"variant": job.variant, "size": job.size, "tokens": best["tokens"], "rows": rows}
    fsio.write_json(
        folder.per_shape("search", job.shape), table | {"chosen": best["learning_rate"]}
    )
    return best["learning_rate"]


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
