"""What the laws fitted to a curve expect, before it is known how far such forecasts are off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mule.plan.forecast_curve import Course, Curve
from mule.plan.forecast_law import Law, fit_training, fit_valid

Figure = Literal["loss", "val_loss", "best_val_loss"]
FIGURES: tuple[Figure, ...] = ("loss", "val_loss", "best_val_loss")
_PATH_POINTS = 60
_LEVEL_SHARE = 0.002  # of the loss: what a forecast of no change is off
_CHANGE_SHARE = 0.25  # of the change that is expected
_FEWEST_EVALUATIONS = 2


@dataclass(frozen=True)
class Point:
    """A loss that is expected after an update, and the unit in which its error is counted."""

    step: int
    predicted: float
    scale: float


@dataclass(frozen=True)
class Outlook:
    """The laws of one curve."""

    curve: Curve
    training: Law | None
    valid: Law | None

    @classmethod
    def of(cls, curve: Curve) -> Outlook:
        training = fit_training(curve)
        after = [step for step, _ in curve.valid if step > curve.course.warmup]
        is_seen = training is not None and len(after) >= _FEWEST_EVALUATIONS
        return cls(curve, training, fit_valid(curve, training) if training and is_seen else None)

    def point(self, figure: Figure, step: int, course: Course | None = None) -> Point | None:
        """A figure after an update of this run, or of one with another course."""
        law = self.training if figure == "loss" else self.valid
        if law is None:
            return None
        chosen = course or self.curve.course
        at, predicted = step, law.at(chosen, step)
        scale = self._scale(law, figure, chosen, step)
        if figure == "best_val_loss":
            at, predicted = self._lowest(law, chosen, step)
        return Point(at, predicted, scale)

    def path(self, figure: Figure) -> list[tuple[int, float]]:
        """(update, loss) from now to the end, a few dozen; empty where nothing can be said."""
        law = self.training if figure == "loss" else self.valid
        if law is None:
            return []
        return [(step, law.at(self.curve.course, step)) for step in self._steps(self.curve.course)]

    def _steps(self, course: Course) -> Sequence[int]:
        left = course.num_steps - self.curve.step
        count = min(left, _PATH_POINTS)
        return [self.curve.step + round(left * i / count) for i in range(count + 1)] if left else []

    def _lowest(self, law: Law, course: Course, until: int) -> tuple[int, float]:
        """Where the validation loss is lowest: an evaluation so far, or on the way to come."""
        ahead = [(s, law.at(course, s)) for s in self._steps(course) if s <= until]
        is_own = course is self.curve.course
        found = ahead + ([best] if (best := self.curve.best_valid()) and is_own else [])
        return min(found or [(until, law.at(course, until))], key=lambda point: point[1])

    def _scale(self, law: Law, figure: Figure, course: Course, step: int) -> float:
        now = self.curve.step
        level = law.at(self.curve.course, now)
        change = law.at(course, step) - level
        noise = self.curve.noise / math.sqrt(self.curve.num_last) if figure == "loss" else 0.0
        spread = law.spread(course, step, min(now, step))
        return _LEVEL_SHARE * abs(level) + noise + _CHANGE_SHARE * abs(change) + spread
