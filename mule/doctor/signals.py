"""What a noisy figure says: middle, noise and trend, none of it moved by outliers.

All of it is plain Python, for the doctor loads neither torch nor numpy, and costs one pass or one
sort. A trend carries its standard error, so that a rule asks by how many errors it differs from
none, not by how much. Errors come from blocks of neighbours: single updates are no independent
draws (Law and Kelton, Simulation Modeling and Analysis, section 9.5.3, batch means).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mule.doctor.history import Series

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_NUM_BLOCKS = 24


@dataclass(frozen=True)
class Trend:
    """A straight line through a figure: change an update, its standard error, and both ends."""

    slope: float
    error: float
    first: float
    last: float

    @property
    def errors(self) -> float:
        """The slope in standard errors, with its sign: beyond 3 it is hardly chance."""
        return _in_errors(self.slope, self.error)


# ---------------------------------------------------------------- values


def median(values: Sequence[float]) -> float:
    """The middle value; NaN of none."""
    return quantile(values, 0.5)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share lies, between two by proportion; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def noise(values: Sequence[float]) -> float:
    """The standard deviation of single values around whatever curve they follow.

    From the differences of neighbours, which a slow trend hardly changes; NaN of fewer than 2.
    """
    differences = [abs(after - before) for before, after in itertools.pairwise(values)]
    return _MAD_TO_DEVIATION * median(differences) / math.sqrt(2)


# ---------------------------------------------------------------- series


def between(series: Series, first: int, last: int) -> Series:
    """The part from update `first` to update `last`, both included."""
    start = bisect.bisect_left(series.steps, first)
    end = bisect.bisect_right(series.steps, last)
    return Series(series.steps[start:end], series.values[start:end])


def parts(series: Series, count: int) -> list[Series]:
    """`count` parts with equally many values, in order: 2 for halves, 4 for quarters."""
    ends = [round(place * len(series) / count) for place in range(count + 1)]
    return [
        Series(series.steps[start:end], series.values[start:end])
        for start, end in itertools.pairwise(ends)
    ]


def thinned(series: Series, count: int = _NUM_BLOCKS) -> Series:
    """At most `count` points: the median of each block of neighbours, at its middle update."""
    blocks = [block for block in parts(series, max(1, min(count, len(series)))) if len(block)]
    return Series(
        [block.steps[len(block) // 2] for block in blocks],
        [median(block.values) for block in blocks],
    )


def smoothed(series: Series, window: int) -> Series:
    """The mean of the last `window` values at each update, of fewer at the start."""
    means, total = [], 0.0
    for place, value in enumerate(series.values):
        total += value
        if place >= window:
            total -= series.values[place - window]
        means.append(total / min(place + 1, window))
    return Series(series.steps, means)


def trend(series: Series) -> Trend:
    """The line of least squares through the medians of blocks; no error of fewer than 3 points."""
    points = thinned(series)
    count = len(points)
    if count < 3:
        ends = (points.values[0], points.values[-1]) if count else (math.nan, math.nan)
        return Trend(0.0, math.inf, *ends)
    middle_x, middle_y = sum(points.steps) / count, sum(points.values) / count
    xs = [step - middle_x for step in points.steps]
    square = sum(x * x for x in xs)
    slope = sum(x * (y - middle_y) for x, y in zip(xs, points.values)) / square
    rest = sum((y - middle_y - slope * x) ** 2 for x, y in zip(xs, points.values))
    error = math.sqrt(rest / (count - 2) / square)
    ends = [middle_y + slope * (step - middle_x) for step in (series.steps[0], series.steps[-1])]
    return Trend(slope, error, *ends)


# ---------------------------------------------------------------- inside


def _in_errors(value: float, error: float) -> float:
    if math.isinf(error) or value == 0:
        return 0.0
    return value / error if error else math.copysign(math.inf, value)
