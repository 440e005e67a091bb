"""The rest of a run, forecast from its curve so far: losses, when to stop, what more would give.

Every figure has an 80% interval from the errors of such forecasts on finished runs; what cannot be
told is said to be so, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mule.plan.forecast_curve import Curve
from mule.plan.forecast_errors import HIGH, LOW, SHARES, Errors, Table, known
from mule.plan.outlook import FIGURES, Figure, Outlook, Point

TWICE = {  # what is asked of more training -> how many times the updates and the data
    "twice the updates": (2, 1),
    "twice the data": (1, 2),
    "twice the data and the updates": (2, 2),
}
DOUBLED = "doubled"  # the figure under which the errors of such forecasts are known
_FEWEST_UPDATES = 15  # after the warm-up
_DIVERGED = 1.1  # times the lowest loss so far: such a run is no case for a forecast
_LEAST_RISE = 0.005  # of the lowest loss, as mule/train/stopping.py has it
_HALF = 0.499  # of the run must be done before twice of it is forecast
_UNTRIED = "how far off such a forecast is at this share of a run was not measured"
_LITTLE = 0.001  # of the loss: less than this is no gain
_NEAR_END = 0.9


@dataclass(frozen=True)
class Estimate:
    """A figure after an update, with what is known of the errors of such forecasts."""

    figure: str
    point: Point
    errors: Errors

    @property
    def step(self) -> int:
        return self.point.step

    @property
    def expected(self) -> float:
        return self._value(0.5)

    @property
    def low(self) -> float:
        return self._value(LOW)

    @property
    def high(self) -> float:
        return self._value(HIGH)

    def probability_below(self, loss: float) -> float:
        """The chance that the figure is at most `loss`."""
        return self.errors.share_below((loss - self.point.predicted) / self.point.scale)

    def _value(self, level: float) -> float:
        return self.point.predicted + self.errors.at(level) * self.point.scale


@dataclass(frozen=True)
class Stop:
    """When to stop: `verdict`, the update it is about, and why."""

    verdict: Literal["rising", "will rise", "levels off", "go on"]
    step: int
    why: str


@dataclass(frozen=True)
class Goal:
    """Whether `goal.val_loss` is reached: its chance, and the update at which it is expected."""

    val_loss: float
    probability: float
    step: int | None


@dataclass(frozen=True)
class Forecast:
    """All that can be said; `cannot` says of the rest why not: (what, why)."""

    curve: Curve
    estimates: Sequence[Estimate]
    twice: Sequence[Estimate]
    stop: Stop | None
    goal: Goal | None
    path: dict[Figure, list[tuple[int, float]]]
    cannot: Sequence[tuple[str, str]]


def forecast(
    curve: Curve,
    *,
    at: Sequence[int] = (),
    goal: float | None = None,
    table: Table | None = None,
) -> Forecast:
    """The forecast of the end of the run, and of the updates `at` that are still to come."""
    table = table or known()
    why = why_not_yet(curve)
    if why is not None:
        reached = _reached(curve, goal)
        return Forecast(
            curve,
            [],
            [],
            _seen_rise(curve),
            reached,
            {},
            [("the losses", f"cannot be told: {why}")],
        )
    outlook = Outlook.of(curve)
    steps = sorted({step for step in at if curve.step < step < curve.num_steps})
    cannot: list[tuple[str, str]] = []
    if outlook.valid is None:
        cannot.append(("the validation loss", f"cannot be told: {_why_no_validation(curve)}"))
    estimates = [
        found
        for step in [*steps, curve.num_steps]
        for figure in FIGURES
        if figure != "best_val_loss" or step == curve.num_steps
        if (found := estimate(outlook, figure, step, table)) is not None
    ]
    told = {e.figure for e in estimates}
    if outlook.valid and "val_loss" not in told and curve.step < curve.num_steps:
        cannot.append(("the validation loss", f"cannot be told: {_UNTRIED}"))
    twice, untold = _twice(outlook, table)
    path = {figure: outlook.path(figure) for figure in FIGURES[:2]}
    stop = _stop(curve, path["val_loss"])
    found_goal = _reached(curve, goal) or _goal(goal, estimates, path["val_loss"])
    return Forecast(curve, estimates, twice, stop, found_goal, path, [*cannot, *untold])


def chance_of(curve: Curve, goal: float, table: Table | None = None) -> Goal | None:
    """Whether the validation loss comes down to `goal`; None where it cannot be told yet."""
    if (reached := _reached(curve, goal)) or why_not_yet(curve):
        return reached
    outlook = Outlook.of(curve)
    best = estimate(outlook, "best_val_loss", curve.num_steps, table)
    return _goal(goal, [best], outlook.path("val_loss")) if best else None


def why_not_yet(curve: Curve) -> str | None:
    """Why nothing can be forecast of this curve; None where something can."""
    needed = max(round(SHARES[0] * curve.num_steps), curve.course.warmup + _FEWEST_UPDATES)
    if needed >= curve.num_steps:
        return (
            f"the run is too short: {curve.num_steps:,} updates, of which a forecast needs the first "
            f"{needed:,}"
        )
    if curve.step < needed:
        return (
            f"the run is too young: update {curve.step:,} of {curve.num_steps:,}; forecasts begin at "
            f"update {needed:,} ({SHARES[0]:.0%} of the run, and {_FEWEST_UPDATES} updates after the "
            "warm-up)"
        )
    if len(curve.losses) < _FEWEST_UPDATES:
        return f"only {len(curve.losses)} losses were logged; {_FEWEST_UPDATES} are needed"
    lowest, newest, chance = curve.fall()
    if newest > _DIVERGED * lowest + chance:
        return (
            f"the training loss has risen from {lowest:.3f} to {newest:.3f}: forecasts are made of "
            "runs that learn; `mule doctor` looks for the cause"
        )
    return None


def estimate(
    outlook: Outlook, figure: Figure, step: int, table: Table | None = None
) -> Estimate | None:
    """One figure after an update of the run; None where it cannot be told."""
    curve = outlook.curve
    if step <= curve.step:
        return None
    ahead = (step - curve.step) / (curve.num_steps - curve.step)
    point = outlook.point(figure, step)
    errors = (table or known()).errors(curve.kind, figure, curve.share, ahead)
    return Estimate(figure, point, errors) if point and errors else None


# ---------------------------------------------------------------- inside


def _why_no_validation(curve: Curve) -> str:
    if not curve.valid:
        return "nothing was validated so far (data.valid, evaluate.every_steps)"
    after = sum(step > curve.course.warmup for step, _ in curve.valid)
    return (
        f"{after} evaluations since the warm-up are too few, two are needed; a lower "
        "evaluate.every_steps brings them sooner"
    )


def _twice(outlook: Outlook, table: Table) -> tuple[list[Estimate], list[tuple[str, str]]]:
    """The lowest validation loss with twice as much of each, and what cannot be told."""
    curve, found = outlook.curve, []
    errors = table.errors(curve.kind, DOUBLED, curve.share, 1.0)
    untold: list[tuple[str, str]] = []
    for name, (steps, data) in TWICE.items():
        if steps > 1 and data > 1 and not curve.course.repeats:
            continue  # the same as twice the updates, which would read data that is new
        if why := _why_not_twice(outlook, data, is_tried=errors is not None):
            untold.append((name, why))
            continue
        course = curve.course.times(steps=steps, data=data)
        point = outlook.point("best_val_loss", course.num_steps, course)
        assert point is not None and errors is not None
        found.append(Estimate(name, point, errors))
    return found, untold


def _why_not_twice(outlook: Outlook, data: int, *, is_tried: bool) -> str | None:
    curve = outlook.curve
    if data > 1 and not curve.course.repeats:
        return (
            f"no change: the run reads its data {curve.course.num_epochs:.2f} times, so that more of "
            "it alone would stay unread"
        )
    if outlook.valid is None or curve.share < _HALF:
        return "cannot be told: half of the run and two evaluations are needed"
    return None if is_tried else f"cannot be told: {_UNTRIED}"


def _seen_rise(curve: Curve) -> Stop | None:
    """A rise of the validation loss that is there already, over two evaluations at least."""
    best = curve.best_valid()
    if best is None:
        return None
    later = [(step, loss) for step, loss in curve.valid if step > best[0]]
    if len(later) < 2 or later[-1][1] <= (1 + _LEAST_RISE) * best[1]:
        return None
    return Stop(
        "rising",
        best[0],
        f"the validation loss was lowest after update {best[0]:,} ({best[1]:.4f}) and has risen to "
        f"{later[-1][1]:.4f}: stop, the best checkpoint is kept; evaluate.patience=2 ends such a "
        "run by itself",
    )


def _stop(curve: Curve, path: Sequence[tuple[int, float]]) -> Stop | None:
    if seen := _seen_rise(curve):
        return seen
    if not path:
        return None
    lowest_at, lowest = min(path, key=lambda point: point[1])
    end = path[-1]
    if end[1] > (1 + _LEAST_RISE) * lowest:
        return Stop(
            "will rise",
            lowest_at,
            f"the validation loss is expected to be lowest near update {lowest_at:,} and to rise "
            f"by {end[1] - lowest:.3f} until the end: evaluate.patience=2 ends the run in time",
        )
    enough = next(step for step, loss in path if loss - lowest <= _LITTLE * lowest)
    if enough < _NEAR_END * curve.num_steps:
        return Stop(
            "levels off",
            enough,
            f"after update {enough:,} less than {_LITTLE:.1%} of the validation loss is left to gain",
        )
    return Stop("go on", curve.num_steps, "the validation loss is expected to fall to the end")


def _reached(curve: Curve, goal: float | None) -> Goal | None:
    """The goal, where it was reached, or the run is over without."""
    if goal is None:
        return None
    at = next((step for step, loss in curve.valid if loss <= goal), None)
    if at is None and curve.step < curve.num_steps:
        return None
    return Goal(goal, 0.0 if at is None else 1.0, at)


def _goal(
    goal: float | None, estimates: Sequence[Estimate], path: Sequence[tuple[int, float]]
) -> Goal | None:
    best = next((e for e in estimates if e.figure == "best_val_loss"), None)
    if goal is None or best is None:
        return None
    shifts = _shifted(path, best.expected - best.point.predicted)
    step = next((step for step, loss in shifts if loss <= goal), None)
    return Goal(goal, best.probability_below(goal), step)


def _shifted(path: Sequence[tuple[int, float]], shift: float) -> Iterator[tuple[int, float]]:
    """The path with the usual error taken off, little at its beginning and all of it at its end."""
    first, last = path[0][0], path[-1][0]
    for step, loss in path:
        yield step, loss + shift * (step - first) / max(1, last - first)
