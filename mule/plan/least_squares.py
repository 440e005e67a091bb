"""Small least-squares problems with prior knowledge of the coefficients, and limits on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_TINY = 1e-12


@dataclass(frozen=True)
class Prior:
    """What is known of a coefficient: near `mean` within `deviation` (None: nothing, 0: exactly)."""

    mean: float = 0.0
    deviation: float | None = None
    lowest: float | None = None


def solve(
    rows: Sequence[Sequence[float]],
    values: Sequence[float],
    weights: Sequence[float],
    priors: Sequence[Prior],
) -> tuple[list[float], float]:
    """The coefficients with the least misfit, and that: squared errors by their weight, and priors.

    `rows` is (points, coefficients). A coefficient that would fall below its lowest value is set to
    it and the others are solved again, the worst first.
    """
    fixed = {place: p.mean for place, p in enumerate(priors) if p.deviation == 0}
    while True:
        found = _solve_free(rows, values, weights, priors, fixed)
        below = [
            (found[place] - prior.lowest, place)
            for place, prior in enumerate(priors)
            if prior.lowest is not None and place not in fixed and found[place] < prior.lowest
        ]
        if not below:
            return found, _misfit(rows, values, weights, priors, found)
        place = min(below)[1]
        fixed[place] = priors[place].lowest or 0.0


def _solve_free(
    rows: Sequence[Sequence[float]],
    values: Sequence[float],
    weights: Sequence[float],
    priors: Sequence[Prior],
    fixed: dict[int, float],
) -> list[float]:
    free = [place for place in range(len(priors)) if place not in fixed]
    size = len(free)
    matrix = [[0.0] * size for _ in free]
    right = [0.0] * size
    for row, value, weight in zip(rows, values, weights):
        left = value - sum(row[place] * known for place, known in fixed.items())
        for i, first in enumerate(free):
            scaled = weight * row[first]
            right[i] += scaled * left
            for j in range(i, size):
                matrix[i][j] += scaled * row[free[j]]
    for i, place in enumerate(free):
        for j in range(i):
            matrix[i][j] = matrix[j][i]
        matrix[i][i] *= 1 + 1e-9  # columns that say the same share what they say
        if deviation := priors[place].deviation:
            matrix[i][i] += 1 / deviation**2
            right[i] += priors[place].mean / deviation**2
    solved = dict(zip(free, _eliminate(matrix, right)))
    return [fixed[place] if place in fixed else solved[place] for place in range(len(priors))]


def _eliminate(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss with the largest pivot; a coefficient that nothing determines is 0."""
    size = len(right)
    rows = [[*line, value] for line, value in zip(matrix, right)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) < _TINY:
            continue
        for r in range(i + 1, size):
            share = rows[r][i] / rows[i][i]
            for c in range(i, size + 1):
                rows[r][c] -= share * rows[i][c]
    solved = [0.0] * size
    for i in reversed(range(size)):
        left = rows[i][size] - sum(rows[i][c] * solved[c] for c in range(i + 1, size))
        solved[i] = left / rows[i][i] if abs(rows[i][i]) >= _TINY else 0.0
    return solved


def _misfit(
    rows: Sequence[Sequence[float]],
    values: Sequence[float],
    weights: Sequence[float],
    priors: Sequence[Prior],
    found: Sequence[float],
) -> float:
    errors = (value - sum(a * b for a, b in zip(row, found)) for row, value in zip(rows, values))
    misfit = sum(weight * error**2 for weight, error in zip(weights, errors))
    for coefficient, prior in zip(found, priors):
        if prior.deviation:
            misfit += ((coefficient - prior.mean) / prior.deviation) ** 2
    return misfit
