"""Axes of the report's plots: from values to places, and round numbers to mark."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """What an axis counts; limits that are None come from the values."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    whole: bool = False  # marks at whole numbers only


@dataclass(frozen=True)
class Scale:
    """Places `low`..`high` of an axis at `start`..`end` of the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._flat(v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values between the limits."""
        return self._log_ticks(count) if self.log else self._even_ticks(count)

    def _flat(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def _even_ticks(self, count: int) -> list[float]:
        step = _round_step((self.high - self.low) / count)
        if self.whole:
            step = max(1.0, step)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [place * step for place in range(first, last + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            ticks = [step * 10.0**decade for decade in decades for step in steps]
            ticks = [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]
            if len(ticks) >= min(count, 3):
                break
        stride = -(-len(ticks) // (2 * count))
        return ticks[::stride]


def scale_for(axis: Axis, values: Iterable[float], start: float, end: float) -> Scale:
    """A scale that shows all `values` with a little room; values are finite, on log axes positive."""
    shown = list(values) or [1.0]
    least, most = min(shown), max(shown)
    low = least if axis.low is None else axis.low
    high = most if axis.high is None else axis.high
    if axis.log:
        room = (high / low) ** 0.05 if high > low else 1.5
        low, high = low / room, high * room
    else:
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        low = low - room if axis.low is None else low
        high = high + room if axis.high is None else high
    if not high > low:
        high = low + (abs(low) or 1.0)
    return Scale(low, high, start, end, axis.log, axis.whole)


def tick_texts(ticks: list[float]) -> list[str]:
    """Their numbers, all in the same unit and with the same digits: 20M, 40M; 3.95, 4.00."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if min((abs(tick) for tick in ticks if tick), default=1.0) < largest / 1000:
        return [f"{tick:g}" for tick in ticks]
    unit, sign = next(((u, s) for u, s in _PREFIXES if largest >= max(u, 10_000)), (1.0, ""))
    if 0 < largest < 1e-3:
        return [f"{tick:.3g}" for tick in ticks]
    digits = next(d for d in range(8) if all(_fits(tick / unit, d) for tick in ticks) or d == 7)
    return [f"{tick / unit:.{digits}f}{sign if tick else ''}" for tick in ticks]


def _fits(value: float, digits: int) -> bool:
    """Whether so many digits after the point say the value."""
    return abs(round(value, digits) - value) <= 1e-9 * max(1.0, abs(value))


def _round_step(rough: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, near `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= 0.75 * rough)
