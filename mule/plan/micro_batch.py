"""Which micro-batch sizes are worth timing before a run, and which of them is best. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TIMED_PASSES = 3  # of each size, the first of which compiles and touches fresh memory
_MIN_RUN_S = 600.0
_MAX_SHARE_OF_RUN = 0.05  # what timing may cost
_MAX_CANDIDATES = 5  # torch.compile stops specialising after 8 shapes
_WORTH = 1.03  # a larger size must be so much faster: it takes more memory


def largest_even_part(step_rows: int, most: int) -> int:
    """The largest divisor of `step_rows` up to `most`: equal parts need one shape, and no padding."""
    return max(n for n in range(1, max(1, min(most, step_rows)) + 1) if step_rows % n == 0)


@dataclass(frozen=True)
class Timing:
    """What timing micro-batches costs: the run's rows and estimated seconds, compiling a size."""

    run_rows: int
    run_s: float
    compile_s: float

    def seconds(self, rows: int) -> float:
        """Of timing one size."""
        return self.compile_s + TIMED_PASSES * self.run_s * rows / self.run_rows


def candidates(step_rows: int, least: int, most: int, timing: Timing) -> tuple[int, ...]:
    """Sizes from `least` to `most` rows, each about twice the last, that divide the update evenly.

    Empty when the run is too short for timing two of them.
    """
    sizes: list[int] = []
    left_s = _MAX_SHARE_OF_RUN * timing.run_s if timing.run_s >= _MIN_RUN_S else 0.0
    goal, most = max(1, least), min(most, step_rows)
    while goal < 2 * most and len(sizes) < _MAX_CANDIDATES:
        rows = largest_even_part(step_rows, min(goal, most))
        goal *= 2
        if rows in sizes:
            continue
        left_s -= timing.seconds(rows)
        if left_s < 0:
            break
        sizes.append(rows)
    return tuple(sizes) if len(sizes) > 1 else ()


def is_worth(rate: float, best_rate: float) -> bool:
    """Whether a larger size is enough faster than the best one before it."""
    return rate > _WORTH * best_rate


def fastest(rates: Sequence[tuple[int, float]]) -> tuple[int, str]:
    """The rows to take, and why, from (rows, tokens/s) by rising rows."""
    best, best_rate = rates[0]
    for rows, rate in rates[1:]:
        if is_worth(rate, best_rate):
            best, best_rate = rows, rate
    (first, first_rate), *others = rates
    told = [f"{first_rate:,.0f} tokens/s with {first} row{'s' * (first > 1)}"]
    told += [f"{rate:,.0f} with {rows}" for rows, rate in others]
    return best, f"measured before the run: {', '.join(told)}"
