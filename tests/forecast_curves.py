"""Curves with a known law, for the tests of forecasts; and a table of errors to go with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mule.config.load import load_recipe, to_yaml
from mule.config.schema import OptimSection, Recipe
from mule.plan.forecast import DOUBLED
from mule.plan.forecast_before import BEFORE
from mule.plan.forecast_curve import Course, Curve, Kind
from mule.plan.forecast_errors import END, HALFWAY, SHARES, Errors, Table
from mule.plan.outlook import FIGURES
from mule.run import Run

_ERRORS = Errors((-2.0, -1.3, -0.5, 0.0, 0.5, 1.3, 2.0), 40)
TABLE = Table(
    {
        **{("all", f, s, a): _ERRORS for f in FIGURES for s in SHARES for a in (HALFWAY, END)},
        **{("all", DOUBLED, share, END): _ERRORS for share in (0.5, 1.0)},
        ("all", BEFORE, 0.0, END): _ERRORS,
    }
)


def course(num_steps: int = 400, *, epochs: float = 0.5, **optim: Any) -> Course:
    section = {"learning_rate": 0.001, "schedule": "cosine", "warmup_steps": 20, **optim}
    return Course(OptimSection.model_validate(section), num_steps, num_steps / epochs)


def true_loss(run: Course, step: int, *, floor: float = 2.0, power: float = 8.0) -> float:
    """The law that the curves follow: 40 updates of delay, the root of the area, an annealing."""
    annealed = run.annealed(20.0)[step]
    return floor + power * (run.areas[step] + 40) ** -0.5 - 0.15 * annealed


def curve(
    run: Course,
    *,
    kind: Kind = "new model",
    noise: float = 0.03,
    overfit: float = 0.0,
    seed: int = 1,
    every: int = 20,
    **law: float,
) -> Curve:
    """A finished run; its validation loss rises with the square of what is repeated."""
    draw = random.Random(seed)

    def loss(step: int) -> float:
        return true_loss(run, step, **law) - 0.5 * overfit * run.repeated(step)

    return Curve(
        kind,
        run,
        [(s, loss(s) + draw.gauss(0, noise)) for s in range(1, run.num_steps + 1)],
        [
            (s, true_loss(run, s, **law) + 0.1 + overfit * run.repeated(s) ** 2)
            for s in range(every, run.num_steps + 1, every)
        ],
    )


RECIPE = """\
model: {family: qwen3, hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, head_dim: 8,
  intermediate_size: 48, max_position_embeddings: 64}
tokenizer: {vocab_size: 300}
data: {train: [text.txt], format: text, max_seq_length: 48}
train: {seed: 3, steps: STEPS, step_rows: 6}
optim: {learning_rate: 0.001, warmup_steps: 20}
"""


def recipe_of(folder: Path, num_steps: int, *words: str) -> Recipe:
    """A recipe of that many updates, as `mule train` has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.replace("STEPS", str(num_steps)))
    return load_recipe(file, list(words)).recipe


def write_run(
    root: Path, name: str, made: Curve, *words: str, until: int | None = None, sums: str = "a"
) -> Run:
    """A run folder that holds the curve, up to an update; finished when that is the last."""
    recipe = recipe_of(root.parent / "recipes" / name, made.num_steps, *words)
    run = Run.create(root, name, "model: {}\n")
    run.write_resolved(to_yaml(recipe))
    run.write_lineage({"sources": [{"file": "text.txt", "bytes": 1, "sha256": sums}]})
    valid = dict(made.valid)
    with run.lock():
        run.start_attempt(from_step=0)
        for step, loss in made.losses[: until or made.num_steps]:
            row: dict[str, Any] = {"step": step, "loss": loss, "num_targets": 288}
            row["epoch"] = step / made.course.steps_per_epoch
            run.log_metrics(row | ({"val_loss": valid[step]} if step in valid else {}))
        if not until or until >= made.num_steps:
            run.log_event("finished", step=made.num_steps)
    return run


def as_text(result: dict[str, Any]) -> str:
    return json.dumps(result, default=str)
