"""The finished runs that forecasts are tried on, and the forecasts made of their beginnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import forecast_runs
from bench.doctor_cases import CASE
from bench.doctor_settings import SETTINGS
from mule import fsio
from mule.plan.forecast import DOUBLED, TWICE, forecast, why_not_yet
from mule.plan.forecast_before import BEFORE, Finished, comparable, expected
from mule.plan.forecast_curve import Curve, read_curve
from mule.plan.forecast_errors import END, HALFWAY, SHARES, Table
from mule.plan.outlook import FIGURES, Figure, Outlook, Point
from mule.run import Run

DOUBLED_AT = (0.5, 1.0)
_FEWEST_UPDATES, _FEWEST_EVALUATIONS = 60, 4
_RISE = 0.005


@dataclass(frozen=True)
class Case:
    """A finished run; `group` is its data set."""

    run: Run
    group: str
    curve: Curve
    spec: dict[str, Any]

    @cached_property
    def finished(self) -> Finished | None:
        return Finished.read(self.run)

    @cached_property
    def best(self) -> float:
        return min(loss for _, loss in self.curve.valid)

    def rise(self) -> tuple[bool, bool] | None:
        """Whether a rise of the validation loss was said at half of the run, and whether it came."""
        half = self.curve.until(self.curve.num_steps // 2)
        stop = forecast(half, table=Table({})).stop
        if stop is None:
            return None
        return "ris" in stop.verdict, self.curve.valid[-1][1] > (1 + _RISE) * self.best

    def as_row(self) -> dict[str, Any]:
        """For the result."""
        curve = self.curve
        return {
            "run": self.run.name,
            "data": self.group,
            "kind": curve.kind,
            "steps": curve.num_steps,
            "epochs": round(curve.course.num_epochs, 2),
            "schedule": curve.course.optim.schedule,
            "val_loss": round(curve.valid[-1][1], 4),
            "best_val_loss": round(self.best, 4),
        }


@dataclass(frozen=True)
class Try:
    """A forecast, what came, and what two naive forecasts would have said."""

    group: str
    kind: str
    figure: str
    share: float
    ahead: str
    point: Point
    actual: float
    last: float
    line: float

    @property
    def key(self) -> tuple[str, str, float, str]:
        return self.kind, self.figure, self.share, self.ahead

    @property
    def error(self) -> float:
        """In units of the scale."""
        return (self.actual - self.point.predicted) / self.point.scale


def cases_below(folders: Sequence[Path]) -> list[Case]:
    """Every healthy run below the folders that came to its end, and was evaluated on the way."""
    found = []
    for folder in folders:
        for file in sorted(folder.rglob("resolved.yaml")):
            if (case := _case(file.parent)) is not None:
                found.append(case)
    return found


def _case(folder: Path) -> Case | None:
    run = Run(folder)
    above = folder.parent.parent
    if run.state() != "finished" or not (folder / "metrics.jsonl").is_file():
        return None
    spec: dict[str, Any] = {}
    if (above / CASE).is_file():
        known = fsio.read_json(above / CASE)
        if known["fault"]:
            return None
        group = SETTINGS[known["part"]][known["setting"]].data
    elif (above / forecast_runs.SPEC).is_file():
        spec = fsio.read_json(above / forecast_runs.SPEC)
        group = spec["data"]
    else:
        group = above.name  # a campaign has one data set
    curve = read_curve(run)
    after = [step for step, _ in curve.valid if step > curve.course.warmup]
    whole = curve.step >= curve.num_steps - 3 and bool(after)
    whole = whole and after[-1] == curve.num_steps  # early stops have no end to compare with
    if not whole or curve.num_steps < _FEWEST_UPDATES or len(after) < _FEWEST_EVALUATIONS:
        return None
    return Case(run, group, curve, spec)


def tries(case: Case) -> Iterator[Try]:
    """Forecasts of all figures at all shares, halfway and to the end."""
    curve = case.curve
    for share in SHARES:
        early = curve.until(round(share * curve.num_steps))
        if why_not_yet(early) is not None:
            continue
        outlook = Outlook.of(early)
        halfway = (early.step + curve.num_steps) // 2
        for figure in FIGURES:
            for ahead, step in ((HALFWAY, halfway), (END, curve.num_steps)):
                point = outlook.point(figure, step)
                actual = _actual(curve, figure, step)
                if point is None or actual is None:
                    continue
                last, line = _naive(early, figure, step)
                yield Try(
                    case.group, curve.kind, figure, share, ahead, point, actual, last, line
                )  # fmt: skip


def doublings(cases: Sequence[Case]) -> Iterator[Try]:
    """Forecasts of the lowest validation loss with twice as much, where such a run is there."""
    known = {
        (c.spec["group"], c.spec["twice"], c.spec["half"]): c for c in cases if "group" in c.spec
    }
    for (group, twice, half), case in known.items():
        for steps, data in TWICE.values():
            if (twice and steps > 1) or (data > 1 and not half):
                continue
            other = known.get((group, twice or steps > 1, half and data == 1))
            if other is None or (data > 1 and not case.curve.course.repeats):
                continue
            for share in DOUBLED_AT:
                early = case.curve.until(round(share * case.curve.num_steps))
                outlook = Outlook.of(early)
                course = case.curve.course.times(steps=steps, data=data)
                point = outlook.point("best_val_loss", course.num_steps, course)
                if point is not None:
                    now = min(loss for _, loss in early.valid)
                    yield Try(
                        case.group, case.curve.kind, DOUBLED, share, END, point,
                        other.best, now, _naive(early, "best_val_loss", course.num_steps)[1],
                    )  # fmt: skip


def befores(cases: Sequence[Case]) -> Iterator[Try]:
    """The validation loss at the end, from the other runs on the same data alone."""
    for case in cases:
        own = case.finished
        if own is None:
            continue
        others = [
            c.finished for c in cases if c is not case and c.finished and c.group == case.group
        ]
        like = comparable(own.recipe, own.sums, others)
        vocab_size = own.recipe.model.vocab_size or own.recipe.tokenizer.vocab_size or 1
        point = expected(own.recipe, vocab_size, like, case.curve.num_steps) if like else None
        if point is not None:
            ends = [other.curve.valid[-1][1] for other in like]
            nearest = min(like, key=lambda other: abs(other.curve.num_steps - case.curve.num_steps))
            yield Try(
                case.group, case.curve.kind, BEFORE, 0.0, END, point,
                case.curve.valid[-1][1], fmean(ends), nearest.curve.valid[-1][1],
            )  # fmt: skip


# ---------------------------------------------------------------- inside


def _actual(curve: Curve, figure: Figure, step: int) -> float | None:
    if figure == "best_val_loss":
        return min(loss for _, loss in curve.valid) if step == curve.num_steps else None
    return curve.value(figure, step)


def _naive(curve: Curve, figure: Figure, step: int) -> tuple[float, float]:
    """The last value, and the straight line through the later half of the values so far."""
    points = [(float(at), loss) for at, loss in (curve.losses if figure == "loss" else curve.valid)]
    later = points[len(points) // 2 :]
    line = _straight(later if len(later) > 1 else points)
    if figure == "loss":
        return curve.mean_loss(curve.step) or points[-1][1], line(step)
    lowest = min(loss for _, loss in points)
    best = figure == "best_val_loss"
    return (lowest, min(lowest, line(step))) if best else (points[-1][1], line(step))


def _straight(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    x, y = fmean(at for at, _ in points), fmean(loss for _, loss in points)
    below = sum((at - x) ** 2 for at, _ in points)
    slope = sum((at - x) * (loss - y) for at, loss in points) / below if below else 0.0
    return lambda at: y + slope * (at - x)
