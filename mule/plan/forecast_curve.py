"""What a forecast is made from: the losses so far, and the course of the whole run.

The course is known before the run ends: the learning rate of each update follows from the recipe,
and how often the data is repeated from its size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, Literal

from mule.config.load import load_recipe
from mule.config.schema import OptimSection, Recipe
from mule.errors import UserError
from mule.plan.schedule import learning_rate
from mule.run import Run

Kind = Literal["new model", "fine-tune"]
LAST_SHARE = 0.05  # of the updates: the training loss "at the end" is their mean
_FEWEST_LAST = 8


@dataclass(frozen=True)
class Course:
    """The learning rate of each update, and how often the data is read. `optim` is resolved."""

    optim: OptimSection
    num_steps: int
    steps_per_epoch: float

    @functools.cached_property
    def warmup(self) -> int:
        """Updates of the warm-up."""
        return min(int(self.optim.warmup_steps or 0), self.num_steps - 1)

    @functools.cached_property
    def rates(self) -> list[float]:
        """The learning rate of each update, as a share of the highest."""
        rate = learning_rate(self.optim, self.warmup, self.num_steps)
        return [rate(step) / float(self.optim.learning_rate) for step in range(self.num_steps)]

    @property
    def num_epochs(self) -> float:
        return self.num_steps / self.steps_per_epoch

    @property
    def repeats(self) -> bool:
        """Whether data is seen again; a few rows over an epoch do not count."""
        return self.num_epochs > 1.05

    def times(self, *, steps: int = 1, data: int = 1) -> Course:
        """The course of a run so many times as long, over so many times the data."""
        return Course(self.optim, steps * self.num_steps, data * self.steps_per_epoch)

    @functools.cached_property
    def areas(self) -> list[float]:
        """After each update the sum of the rates so far; 0 before the first.

        `S1` of Tissue et al. 2024 (arXiv 2408.11029), in updates at the highest rate.
        """
        areas = [0.0]
        for rate in self.rates:
            areas.append(areas[-1] + rate)
        return areas

    @functools.cached_property
    def _annealed(self) -> dict[float, list[float]]:
        return {}

    def annealed(self, memory: float) -> list[float]:
        """After each update the fall of the rate so far, each fall felt with a delay.

        `S2` of Tissue et al. 2024, equation 2, with lambda = exp(-1 / `memory`), times 1 - lambda:
        from 0 at the highest rate to 1 long after the rate has fallen to 0.
        """
        if memory not in self._annealed:
            decay, felt, momentum, values = math.exp(-1 / memory), 0.0, 0.0, [0.0]
            for step, rate in enumerate(self.rates):
                fall = self.rates[step - 1] - rate if step > self.warmup else 0.0
                momentum = decay * momentum + fall
                felt += momentum
                values.append((1 - decay) * felt)
            self._annealed[memory] = values
        return self._annealed[memory]

    def repeated(self, step: int) -> float:
        """The work done on data seen before, in epochs at the highest rate."""
        if step <= self.steps_per_epoch:
            return 0.0
        first = int(self.steps_per_epoch)
        return (self.areas[step] - self.areas[first]) / self.steps_per_epoch


@dataclass(frozen=True)
class Curve:
    """The losses of a run so far. `losses` and `valid` hold (update, nats a token), in order."""

    kind: Kind
    course: Course
    losses: Sequence[tuple[int, float]]
    valid: Sequence[tuple[int, float]]

    @property
    def num_steps(self) -> int:
        return self.course.num_steps

    @property
    def step(self) -> int:
        """The newest update."""
        return self.losses[-1][0] if self.losses else 0

    @property
    def share(self) -> float:
        """Of the run that is done."""
        return self.step / self.num_steps

    def until(self, step: int) -> Curve:
        """The curve as it was after that update."""
        return replace(
            self,
            losses=[point for point in self.losses if point[0] <= step],
            valid=[point for point in self.valid if point[0] <= step],
        )

    @property
    def num_last(self) -> int:
        """Updates over which the training loss "at" one of them is a mean."""
        return max(_FEWEST_LAST, round(LAST_SHARE * self.num_steps))

    def mean_loss(self, step: int) -> float | None:
        """The training loss "at" an update: the mean of the last few updates up to it."""
        last = [loss for at, loss in self.losses if step - self.num_last < at <= step]
        return fmean(last) if last else None

    def value(self, figure: str, step: int) -> float | None:
        """`loss` or `val_loss` at an update; a validation loss between two evaluations in between."""
        if figure == "loss":
            return self.mean_loss(step) if step <= self.step else None
        before = max((point for point in self.valid if point[0] <= step), default=None)
        after = min((point for point in self.valid if point[0] >= step), default=None)
        if before is None or after is None:
            return None
        part = (step - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
        return before[1] + part * (after[1] - before[1])

    def fall(self) -> tuple[float, float, float]:
        """The lowest mean training loss, the newest one, and what chance may put between them."""
        values = [loss for _, loss in self.losses]
        size = min(self.num_last, len(values))
        starts = range(len(values) % size, len(values), size)
        means = [fmean(values[start : start + size]) for start in starts]
        return min(means), means[-1], 4 * self.noise / math.sqrt(size)

    def best_valid(self) -> tuple[int, float] | None:
        """The first evaluation with the lowest loss."""
        return min(self.valid, key=lambda point: point[1], default=None)

    @functools.cached_property
    def noise(self) -> float:
        """The standard deviation of one update's loss about its neighbours'.

        From second differences, which a slope does not touch; 1.4826 makes a median absolute value
        a standard deviation.
        """
        values = [loss for _, loss in self.losses][-200:]
        second = [
            abs(values[i] - 2 * values[i + 1] + values[i + 2]) for i in range(len(values) - 2)
        ]
        return 1.4826 * median(second) / math.sqrt(6) if second else 0.0


def read_curve(run: Run) -> Curve:
    """The curve of a run; UserError of one that has made no update."""
    file = run.folder / "resolved.yaml"
    rows = [row for row in run.metrics() if row.get("loss") is not None] if file.is_file() else []
    if not rows:
        raise UserError(
            f"{run.folder} has made no update yet: there is no curve to go by",
            f"start it: mule train {run.folder / 'recipe.yaml'} --resume",
        )
    return curve_of(load_recipe(file, []).recipe, rows)


def curve_of(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> Curve:
    """The curve of a resolved recipe and its rows of metrics."""
    num_steps, last = int(recipe.train.steps or 0), rows[-1]
    epochs = last.get("epoch") or 0.0
    steps_per_epoch = last["step"] / epochs if epochs else math.inf
    kind: Kind = "new model" if recipe.model.path is None else "fine-tune"
    return Curve(
        kind,
        Course(recipe.optim, num_steps, steps_per_epoch),
        [(row["step"], row["loss"]) for row in rows if _is_figure(row.get("loss"))],
        [(row["step"], row["val_loss"]) for row in rows if _is_figure(row.get("val_loss"))],
    )


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
