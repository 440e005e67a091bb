"""The phases of a run: its warm-up, how far its schedule has come, and what was learned in each.

`Bend` says how fast the loss falls per unit of learning rate at first and later. While a model is far
from what its data can teach, the loss falls in proportion to the learning rate spent; a run that learns
leaves that stretch within its first updates, and its curve bends.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

from mule.doctor import signals
from mule.doctor.history import History, Kind, Series

# The standard deviation that weights begin with, or a little more; in an adapter's first matrix.
WEIGHT_SIZE: dict[Kind, float] = {"pretrain": 0.02, "fine-tune": 0.02, "adapter": 0.03}
_FEWEST_UPDATES, _FEWEST_POINTS, _POINTS = 12, 6, 12
_STRAIGHT_QUARTER, _STRAIGHT_HALF = 0.42, 0.64
_LEAST_FALL = 0.005  # of the first loss
_MOST_NOISE = 0.1  # of the fall


@dataclass(frozen=True)
class Bend:
    """What was learned, and how much of it with the first quarter and half of the learning rate spent.

    A straight line has 0.25 and 0.5. Sound runs of this repository's benches had 0.46 to 0.92 and 0.64
    to 1; of one whose rate was a hundred times too low they were 0.33 and 0.61.
    """

    first: float
    fall: float
    quarter: float
    half: float

    @property
    def is_straight(self) -> bool:
        """Whether the loss fell, and in proportion to the learning rate spent."""
        steady = 0 < self.quarter < self.half < 1
        fell = steady and self.fall > _LEAST_FALL * self.first
        return fell and self.quarter < _STRAIGHT_QUARTER and self.half < _STRAIGHT_HALF


def warmup_steps(history: History) -> int:
    """Updates of warm-up, as resolved."""
    return int(history.recipe.optim.warmup_steps or 0)


def peak_rate(history: History) -> float:
    """The highest learning rate of the schedule; 0 where it was never resolved."""
    rate = history.recipe.optim.learning_rate
    return 0.0 if rate == "auto" else float(rate)


def after_warmup(history: History, name: str = "loss") -> Series:
    """A figure from the first update at the full rate."""
    return signals.between(history.series(name), warmup_steps(history) + 1, history.step)


def recent(series: Series, share: float = 0.125, least: int = 8) -> Series:
    """The last values: that share of them, and `least` where there are so many."""
    count = min(len(series), max(least, round(share * len(series))))
    start = len(series) - count
    return Series(series.steps[start:], series.values[start:])


def start(series: Series, share: float = 0.05, most: int = 50) -> Series:
    """The first values, before much was learned: at least 3, at most `most`."""
    count = min(len(series), max(3, min(most, round(share * len(series)))))
    return Series(series.steps[:count], series.values[:count])


def block_error(series: Series, num_blocks: int = 24) -> float:
    """The standard error of the median of one of `num_blocks` blocks, from the noise of neighbours."""
    size = max(1.0, len(series) / num_blocks)
    return signals.noise(series.values) * (1.25 if size > 2 else 1.0) / size**0.5


def rate_at(history: History, step: int) -> float:
    """The learning rate of an update as a share of its peak; 1 where none was logged."""
    rates, peak = history.series("learning_rate"), peak_rate(history)
    found = signals.between(rates, step, step).values
    return found[0] / peak if found and peak else 1.0


def bend(history: History) -> Bend | None:
    """How the curve bends over the learning rate spent; None of too few updates, or too much noise.

    Of the validation loss where it was measured often: its rows are fixed, so it has hardly noise.
    """
    loss, rates = history.series("loss"), history.series("learning_rate")
    if len(loss) < _FEWEST_UPDATES or len(loss) != len(rates):
        return None
    points = history.series("val_loss")
    first = signals.median(loss.values[:3])
    if len(points) < _FEWEST_POINTS:
        points = signals.thinned(loss, _POINTS)
        if block_error(loss, _POINTS) > _MOST_NOISE * (first - points.values[-1]):
            return None
    sums = list(itertools.accumulate(rates.values))
    places = [bisect.bisect_left(rates.steps, step) for step in points.steps]
    spent = [0.0, *(sums[min(place, len(sums) - 1)] / sums[-1] for place in places)]
    falls = [0.0, *(first - value for value in points.values)]
    whole = falls[-1]
    if whole <= 0:
        return Bend(first, whole, 1.0, 1.0)
    quarter, half = (_between(spent, falls, share * spent[-1]) / whole for share in (0.25, 0.5))
    return Bend(first, whole, quarter, half)


def _between(xs: list[float], ys: list[float], x: float) -> float:
    """The value at x of the line through the points; xs rise, and x is among them."""
    place = max(1, bisect.bisect_left(xs, x))
    share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])


def lower_rate(history: History, times: float) -> str:
    """The setting of a learning rate that is so many times lower."""
    return f"optim.learning_rate={peak_rate(history) / times:.2g}"


def higher_rate(history: History, times: float) -> str:
    """The setting of a learning rate that is so many times higher, 1 at most."""
    return f"optim.learning_rate={min(1.0, peak_rate(history) * times):.2g}"
