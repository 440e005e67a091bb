"""The loss of a run that has not begun, from finished runs that learned from the same data.

Losses of other data or another tokenizer are no guide. Comparable runs may differ in size, length,
batch and learning rate: the law of each is read off at the course of the new run, near ones count
most, and where they differ in size its effect is fitted. How far off that is was measured on runs
of which the finished ones beside them were known (bench/forecast.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mule import fsio
from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.errors import MuleError
from mule.models import cost
from mule.models.config import ModelConfig
from mule.plan.forecast import Estimate
from mule.plan.forecast_curve import Course, Curve, curve_of
from mule.plan.forecast_errors import Table, known
from mule.plan.forecast_law import Law
from mule.plan.least_squares import Prior, solve
from mule.plan.outlook import Outlook, Point
from mule.plan.shape import new_model_config
from mule.run import Run

BEFORE = "before"  # the figure under which the errors of such forecasts are known
_MILESTONES = (0.25, 0.5, 0.75, 1.0)
_SIZE_EFFECT = 0.08  # of the loss, for a model e times as large: what it may be
_SCALE, _SCALE_OF_DISTANCE = 0.01, 0.04  # of the loss
_MOST_RUNS = 12  # the nearest ones
_FEWEST_EVALUATIONS = 4
Sums = frozenset[str]  # SHA-256 of the data files


@dataclass(frozen=True)
class Finished:
    """A run that came to its end, with the sums of its data."""

    name: str
    recipe: Recipe
    curve: Curve
    sums: Sums

    @classmethod
    def read(cls, run: Run) -> Finished | None:
        """None of a run that did not come to its end, or was not validated."""
        file = run.folder / "resolved.yaml"
        if not file.is_file() or run.state() != "finished":
            return None
        recipe = load_recipe(file, []).recipe
        rows = [row for row in run.metrics() if row.get("loss") is not None]
        if not rows or rows[-1]["step"] != recipe.train.steps:
            return None
        curve = curve_of(recipe, rows)
        if len(curve.valid) < _FEWEST_EVALUATIONS:
            return None
        sums = frozenset(source["sha256"] for source in run.read_lineage().get("sources", ()))
        return cls(run.name, recipe, curve, sums)

    @cached_property
    def law(self) -> Law | None:
        return Outlook.of(self.curve).valid


@dataclass(frozen=True)
class Before:
    """The validation loss at milestones, from which runs; or why it cannot be told."""

    estimates: Sequence[Estimate]
    runs: Sequence[str]
    cannot: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As `mule plan` gives it."""
        rows = [
            {"step": e.step, "val_loss": e.expected, "low": e.low, "high": e.high}
            for e in self.estimates
        ]
        return {"milestones": rows, "runs": list(self.runs), "cannot": self.cannot}


def forecast_before(
    recipe: Recipe, config: ModelConfig, runs: Iterable[Run], *, table: Table | None = None
) -> Before:
    """The forecast of a resolved recipe and its model, from the runs that compare with it."""
    found = [run for run in map(_readable, runs) if run is not None]
    like = [run for run in found if _learns_alike(recipe, run.recipe)]
    like = comparable(recipe, _sums(recipe), like) if like else []
    if not like:
        return Before([], [], _why_none(found))
    errors = (table or known()).errors(_kind(recipe), BEFORE, 0.0, 1.0)
    if errors is None:
        return Before([], [], "cannot be told: how far off such a forecast is was not measured yet")
    num_steps = int(recipe.train.steps or 0)
    steps = sorted({max(1, round(share * num_steps)) for share in _MILESTONES})
    points = [point for step in steps if (point := expected(recipe, config.vocab_size, like, step))]
    estimates = [Estimate("val_loss", point, errors) for point in points]
    return Before(estimates, [run.name for run in like])


def comparable(recipe: Recipe, sums: Sums, runs: Iterable[Finished]) -> list[Finished]:
    """The runs that learned from the same files by the same tokenizer, held out alike."""
    return [run for run in runs if run.sums == sums and _learns_alike(recipe, run.recipe)]


def expected(recipe: Recipe, vocab_size: int, runs: Sequence[Finished], step: int) -> Point | None:
    """The validation loss after an update; None where no run can tell."""
    measured = sorted((_distance(recipe, vocab_size, run), place) for place, run in enumerate(runs))
    rows, values, weights = [], [], []
    for distance, place in measured[:_MOST_RUNS]:
        run = runs[place]
        if run.law is None:
            continue
        rows.append([1.0, _size(run.recipe, vocab_size) - _size(recipe, vocab_size)])
        values.append(_read_off(recipe, run, step))
        weights.append(math.exp(-2 * distance))
    if not values:
        return None
    level = values[0]
    priors = [Prior(), Prior(0.0, _SIZE_EFFECT * level)]
    precise = [weight / (_SCALE * level) ** 2 for weight in weights]
    (loss, _), _ = solve(rows, values, precise, priors)
    total = sum(weights)
    spread = math.sqrt(sum(w * (value - loss) ** 2 for w, value in zip(weights, values)) / total)
    scale = (_SCALE + _SCALE_OF_DISTANCE * measured[0][0]) * level + spread
    return Point(step, loss, scale)


# ---------------------------------------------------------------- inside


def _readable(run: Run) -> Finished | None:
    """A folder that an older or a newer Mule wrote is no reason to fail."""
    try:
        return Finished.read(run)
    except MuleError:
        return None


def _kind(recipe: Recipe) -> str:
    return "new model" if recipe.model.path is None else "fine-tune"


def _learns_alike(recipe: Recipe, other: Recipe) -> bool:
    """Whether losses are in the same unit: tokens, base, rows and what is held out."""

    def unit(one: Recipe) -> tuple[Any, ...]:
        return (
            one.tokenizer,
            one.model.path,
            one.model.module,
            one.adapter.kind,
            one.data.valid,
            one.data.format,
            one.data.max_seq_length,
        )

    shares = {recipe.data.valid_share, other.data.valid_share} - {"auto"}  # auto follows the data
    return unit(recipe) == unit(other) and len(shares) <= 1


def _sums(recipe: Recipe) -> Sums:
    """Of the data files; none where they cannot be found, which is said elsewhere."""
    from mule.data.sources import expand

    try:
        return frozenset(fsio.sha256_file(file) for file in expand(recipe.data.train))
    except MuleError:
        return frozenset()


def _distance(recipe: Recipe, vocab_size: int, run: Finished) -> float:
    """How unlike two runs are; 0 of one that differs in nothing but its seed."""
    other, steps = run.recipe, int(recipe.train.steps or 1) * _rows_ratio(recipe, run.recipe)
    return (
        abs(_size(other, vocab_size) - _size(recipe, vocab_size))
        + 0.5 * abs(math.log(steps / run.curve.num_steps))
        + 0.5 * abs(math.log(_rate(recipe) / _rate(other)))
        + (recipe.optim.kind != other.optim.kind)
        + 0.2 * (recipe.optim.schedule != other.optim.schedule)
    )


def _rate(recipe: Recipe) -> float:
    return float(recipe.optim.learning_rate)


def _rows_ratio(recipe: Recipe, other: Recipe) -> float:
    return int(recipe.train.step_rows or 1) / int(other.train.step_rows or 1)


def _size(recipe: Recipe, vocab_size: int) -> float:
    """The logarithm of the active parameters; of fine-tunes of one base all alike."""
    if recipe.model.path is not None:
        return 0.0
    return math.log(cost.active_params(new_model_config(recipe, vocab_size)))


def _read_off(recipe: Recipe, run: Finished, step: int) -> float:
    """The law of a run at the course of another, counted in tokens."""
    assert run.law is not None
    ratio = _rows_ratio(recipe, run.recipe)
    warmup = round(int(recipe.optim.warmup_steps or 0) * ratio)
    num_steps = max(1, round(int(recipe.train.steps or 1) * ratio))
    optim = recipe.optim.model_copy(update={"warmup_steps": warmup})
    course = Course(optim, num_steps, run.curve.course.steps_per_epoch)
    return run.law.at(course, min(num_steps, max(1, round(step * ratio))))


def _why_none(found: Sequence[Finished]) -> str:
    if not found:
        return "cannot be told: no finished run is here to compare with"
    return (
        f"cannot be told: none of {len(found)} finished runs learned from the same files with the same "
        "tokenizer, held out alike; losses of others are no guide"
    )
