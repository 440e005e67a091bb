"""A law of the loss, fitted to the curve so far in many forms at once.

    training:    L(s) = L0 + A (S1(s) + c)^-alpha - C S2(s) - M R(s)
    validation:  V(s) = a + b (L0 + A (S1(s) + c)^-alpha - C S2(s)) + B R(s)^q

S1 is the sum of the learning rates, S2 what their fall has brought (Tissue et al. 2024, arXiv
2408.11029, equation 1), R the work on data seen before: it lowers the training loss (M) and raises
the validation loss (B). Given the exponents both are linear, so each is one small least-squares
problem. The exponents cannot be told from a part of a curve: every combination of a grid is
fitted, to the whole curve and to its later parts, and all count by how well they fit. What the
part does not show yet, such as the gain of an annealing that is still to come, is held near what
finished runs have shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean
from typing import TypeVar

from mule.plan.forecast_curve import Course, Curve
from mule.plan.least_squares import Prior, solve

_EXPONENTS = (0.25, 0.5, 1.0, 2.0)
_OFFSETS = (0.01, 0.1, 0.4)  # c, as shares of the area under the whole run's rates
_MEMORIES = (0.02, 0.1)  # of S2, as shares of the run
_POWERS = (1.0, 2.0)  # q
_LEFT_OUT = (0.0, 0.2, 0.45)  # of the part after the warm-up, at its beginning
_NUM_BINS = 32
_FEWEST_POINTS = 5
_MODEL_ERROR = 0.003  # a law is not better than this, as a share of the loss
# What is expected before the curve shows it, as (mean, standard deviation), in shares of the loss.
_ANNEALING = {"new model": (0.03, 0.02), "fine-tune": (0.01, 0.01)}
_BY_HEART = (0.0, 0.15)  # M
_OVERFIT = (0.0, 0.05)  # B
_SLOPE = (1.0, 0.15)  # b: validation falls as training does


@dataclass(frozen=True)
class Form:
    """One combination of the grid."""

    exponent: float
    offset: float  # in updates at the highest rate
    reference: float  # of S1 + c, where the power is 1
    memory: float  # in updates

    def columns(self, course: Course, step: int) -> tuple[float, float, float]:
        """The power, S2 and R after an update."""
        power = ((course.areas[step] + self.offset) / self.reference) ** -self.exponent
        return power, course.annealed(self.memory)[step], course.repeated(step)


@dataclass(frozen=True)
class Member:
    """A form with its coefficients. `by_heart` is of the training loss, the rest of both."""

    form: Form
    level: float
    power: float
    annealing: float
    by_heart: float
    weight: float

    def fresh(self, course: Course, step: int) -> float:
        """The training loss on data that were not seen before."""
        power, annealed, _ = self.form.columns(course, step)
        return self.level + self.power * power - self.annealing * annealed

    def loss(self, course: Course, step: int) -> float:
        return self.fresh(course, step) - self.by_heart * course.repeated(step)


@dataclass(frozen=True)
class ValidMember:
    """A validation loss that follows one fit of the training loss."""

    member: Member
    shift: float
    slope: float
    overfit: float
    exponent: float
    weight: float

    def loss(self, course: Course, step: int) -> float:
        fresh = self.member.fresh(course, step)
        return (
            self.shift + self.slope * fresh + self.overfit * course.repeated(step) ** self.exponent
        )


M = TypeVar("M", Member, ValidMember)


@dataclass(frozen=True)
class Law:
    """All fits of one figure; a forecast is their weighted mean."""

    members: Sequence[Member] | Sequence[ValidMember]

    def at(self, course: Course, step: int) -> float:
        """The loss after an update of a course, which need not be the one that was fitted."""
        return sum(m.weight * m.loss(course, step) for m in self.members)

    def spread(self, course: Course, step: int, since: int) -> float:
        """The standard deviation among the fits of the change from one update to another."""
        changes = [m.loss(course, step) - m.loss(course, since) for m in self.members]
        mean = sum(m.weight * change for m, change in zip(self.members, changes))
        return math.sqrt(
            sum(m.weight * (change - mean) ** 2 for m, change in zip(self.members, changes))
        )


def fit_training(curve: Curve) -> Law | None:
    """The law of the training loss; None where there are too few points after the warm-up."""
    points = [point for point in curve.losses if point[0] > curve.course.warmup]
    found: list[Member] = []
    for share in _LEFT_OUT:
        kept = points[int(share * len(points)) :]
        if len(kept) < _FEWEST_POINTS * 2:
            break
        found += _fitted(curve, _binned(kept))
    return Law(_normalised(found)) if found else None


def fit_valid(curve: Curve, training: Law) -> Law | None:
    """The law of the validation loss beside that of the training loss; None without evaluations."""
    points = [point for point in curve.valid if point[0] > curve.course.warmup]
    if not points:
        return None
    powers = _POWERS if curve.course.repeats else (1.0,)
    found: list[tuple[ValidMember, float]] = []
    for member, power in product(training.members, powers):
        assert isinstance(member, Member)
        found.append(_valid_fit(curve, member, points, power))
    best = min(misfit for _, misfit in found)
    freedom = max(1.0, best / len(points))
    weighed = [
        ValidMember(
            m.member, m.shift, m.slope, m.overfit, m.exponent,
            m.weight * math.exp(-(misfit - best) / 2 / freedom),
        )
        for m, misfit in found
    ]  # fmt: skip
    return Law(_normalised(weighed))


# ---------------------------------------------------------------- inside


def _binned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float, int]]:
    """(update, mean loss, updates) of consecutive updates, few enough to be fitted quickly."""
    size = max(1, math.ceil(len(points) / _NUM_BINS))
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (round(fmean(step for step, _ in part)), fmean(loss for _, loss in part), len(part))
        for part in bins
    ]


def _fitted(curve: Curve, bins: Sequence[tuple[int, float, int]]) -> list[Member]:
    """Every form, each weighed by its fit."""
    course, level = curve.course, bins[-1][1]
    floor = (_MODEL_ERROR * level) ** 2
    weights = [1 / (curve.noise**2 / count + floor) for _, _, count in bins]
    losses = [loss for _, loss, _ in bins]
    mean, deviation = _ANNEALING[curve.kind]
    priors = [
        Prior(),
        Prior(lowest=0.0),
        Prior(mean * level, deviation * level, lowest=0.0),
        Prior(_BY_HEART[0], _BY_HEART[1] * level if course.repeats else 0.0, lowest=0.0),
    ]
    found: list[tuple[Form, list[float], float]] = []
    for form in _forms(course, bins[-1][0]):
        rows = []
        for step, _, _ in bins:
            power, annealed, repeated = form.columns(course, step)
            rows.append([1.0, power, -annealed, -repeated])
        coefficients, misfit = solve(rows, losses, weights, priors)
        if coefficients[0] < 0:  # a loss below zero is no law
            misfit += (coefficients[0] / (0.1 * level)) ** 2
        found.append((form, coefficients, misfit))
    best = min(misfit for _, _, misfit in found)
    freedom = max(1.0, best / max(1, len(bins) - 3))
    likelihoods = [math.exp(-(misfit - best) / 2 / freedom) for _, _, misfit in found]
    total = sum(likelihoods)
    return [
        Member(form, *coefficients, weight=likelihood / total)
        for (form, coefficients, _), likelihood in zip(found, likelihoods)
    ]


def _forms(course: Course, step: int) -> list[Form]:
    area = course.areas[-1]
    return [
        Form(
            exponent,
            offset * area,
            course.areas[step] + offset * area,
            max(1.0, memory * course.num_steps),
        )
        for exponent, offset, memory in product(_EXPONENTS, _OFFSETS, _MEMORIES)
    ]


def _valid_fit(
    curve: Curve,
    member: Member,
    points: Sequence[tuple[int, float]],
    power: float,
) -> tuple[ValidMember, float]:
    course, level = curve.course, points[-1][1]
    rows = [[1.0, member.fresh(course, step), course.repeated(step) ** power] for step, _ in points]
    # The newest evaluations tell most of those to come.
    weights = [
        (0.3 + 0.7 * (place + 1) / len(points)) / (_MODEL_ERROR * level) ** 2
        for place in range(len(points))
    ]
    priors = [
        Prior(),
        Prior(*_SLOPE, lowest=0.0),
        Prior(_OVERFIT[0], _OVERFIT[1] * level if course.repeats else 0.0, lowest=0.0),
    ]
    coefficients, misfit = solve(rows, [loss for _, loss in points], weights, priors)
    return ValidMember(member, *coefficients, exponent=power, weight=member.weight), misfit


def _normalised(members: Sequence[M]) -> list[M]:
    """With weights that sum to 1; what counts for nothing is left out."""
    most = max(m.weight for m in members)
    kept = [m for m in members if m.weight > 1e-3 * most]
    total = sum(m.weight for m in kept)
    return [replace(m, weight=m.weight / total) for m in kept]
