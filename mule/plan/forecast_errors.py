"""How far forecasts were off: the errors of past forecasts, measured by `bench/forecast.py`.

An error counts in units of the forecast's own scale (mule/plan/outlook.py). The interval of a
forecast is where the errors of such forecasts lay, made on finished runs at the same share of the
run (split conformal prediction: Vovk et al. 2005; Lei et al. 2018, arXiv 1604.04173).
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule import fsio

FILE = Path(__file__).with_name("forecast_errors.json")
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
LOW, HIGH = 0.1, 0.9  # of the 80% interval
SHARES = (0.15, 0.25, 0.5, 0.75, 0.9)  # of a run, at which forecasts were tried
HALFWAY, END = "halfway", "end"  # how far ahead: half of what was left, or all of it
FEWEST = 15  # errors that make a cell


@dataclass(frozen=True)
class Errors:
    """The quantiles of past errors at `LEVELS`, in units of a forecast's scale."""

    quantiles: tuple[float, ...]
    num_runs: int

    @classmethod
    def of(cls, errors: Sequence[float]) -> Errors:
        return cls(tuple(quantile(errors, level) for level in LEVELS), len(errors))

    def at(self, level: float) -> float:
        return self.quantiles[LEVELS.index(level)]

    def share_below(self, error: float) -> float:
        """The share of past errors below; never surer than the outer levels."""
        if error <= self.quantiles[0]:
            return LEVELS[0]
        if error >= self.quantiles[-1]:
            return LEVELS[-1]
        place = bisect_right(self.quantiles, error) - 1
        low, high = self.quantiles[place], self.quantiles[place + 1]
        part = (error - low) / (high - low) if high > low else 0.0
        return LEVELS[place] + part * (LEVELS[place + 1] - LEVELS[place])

    def between(self, other: Errors, part: float) -> Errors:
        """Part of the way from these to the other ones."""
        mixed = (a + part * (b - a) for a, b in zip(self.quantiles, other.quantiles))
        return Errors(tuple(mixed), min(self.num_runs, other.num_runs))


def quantile(values: Sequence[float], level: float) -> float:
    """With the (n + 1) rule, which covers a further value with that chance."""
    ordered = sorted(values)
    place = min(max(level * (len(ordered) + 1) - 1, 0.0), len(ordered) - 1.0)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Table:
    """The errors by what was forecast: (kind, figure, share of the run, how far ahead)."""

    cells: dict[tuple[str, str, float, str], Errors]

    @classmethod
    def learned(cls, errors: Iterable[tuple[tuple[str, str, float, str], float]]) -> Table:
        """From single errors; what has too few of its own takes those of both kinds."""
        found: dict[tuple[str, str, float, str], list[float]] = {}
        for (kind, figure, share, ahead), error in errors:
            for place in (kind, "all"):
                found.setdefault((place, figure, share, ahead), []).append(error)
        return cls({key: Errors.of(own) for key, own in found.items() if len(own) >= FEWEST})

    def errors(self, kind: str, figure: str, share: float, ahead: float) -> Errors | None:
        """Of forecasts at that share of the run, `ahead` (0 to 1) of what is left of it.

        Between two shares that were tried, in between; before the first, None.
        """
        shares = sorted({key[2] for key in self.cells if key[1] == figure})
        if not shares or share < shares[0] * 0.999:
            return None
        lower = max(s for s in shares if s <= share * 1.001)
        upper = min((s for s in shares if s >= share), default=lower)
        part = (share - lower) / (upper - lower) if upper > lower else 0.0
        near, far = self._cell(kind, figure, lower, ahead), self._cell(kind, figure, upper, ahead)
        return near.between(far, min(max(part, 0.0), 1.0)) if near and far else near or far

    def _cell(self, kind: str, figure: str, share: float, ahead: float) -> Errors | None:
        end, half = (self._own(kind, figure, share, reach) for reach in (END, HALFWAY))
        if end is None or half is None:
            return end or half
        return half.between(end, min(max(2 * ahead - 1, 0.0), 1.0))

    def _own(self, kind: str, figure: str, share: float, reach: str) -> Errors | None:
        return self.cells.get((kind, figure, share, reach)) or self.cells.get(
            ("all", figure, share, reach)
        )

    def as_rows(self) -> list[dict[str, Any]]:
        """For the file."""
        return [
            {
                "kind": kind,
                "figure": figure,
                "share": share,
                "ahead": ahead,
                "num_runs": errors.num_runs,
                "quantiles": [round(q, 4) for q in errors.quantiles],
            }
            for (kind, figure, share, ahead), errors in sorted(self.cells.items())
        ]


@functools.cache
def known() -> Table:
    """The errors that come with Mule."""
    return read_table(fsio.read_json(FILE)["cells"])


def read_table(rows: Iterable[dict[str, Any]]) -> Table:
    """What `as_rows` wrote."""
    return Table(
        {
            (row["kind"], row["figure"], row["share"], row["ahead"]): Errors(
                tuple(row["quantiles"]), row["num_runs"]
            )
            for row in rows
        }
    )
