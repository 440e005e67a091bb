"""Models beside the first one, item by item: how far apart, and whether that can be measured.

The interval is a paired bootstrap over the items. Whether a difference is measurable is decided by a
sign-flip test, corrected by Holm's method over the whole table: of tables of equal models at most 5
in 100 claim a difference anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mule.statistics import CONFIDENCE, bootstrap_interval, holm, sign_flip_p

Verdict = Literal["better", "worse", "no measurable difference"]


@dataclass(frozen=True)
class Compared:
    """One model against the first, on one measure of one task, in the unit of the measure.

    `difference` is the model's less the first one's; `p` is that of the test alone, `adjusted_p`
    after the correction.
    """

    task: str
    measure: str
    model: str
    than: str
    difference: float
    low: float
    high: float
    num_items: int
    p: float
    adjusted_p: float = 1.0
    verdict: Verdict = "no measurable difference"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired(
    task: str,
    measure: str,
    models: tuple[str, str],
    values: tuple[Sequence[float], Sequence[float]],
    weights: Sequence[float] | None = None,
) -> Compared:
    """The second model against the first, on the same items; `values` are both models' scores.

    With `weights` they are sums, as of a loss over the tokens of each item.
    """
    first, second = values
    apart = [b - a for a, b in zip(first, second, strict=True)]
    found = bootstrap_interval(apart, weights)
    than, model = models
    p = sign_flip_p(apart)
    return Compared(task, measure, model, than, found.mean, found.low, found.high, found.n, p)


def judged(rows: Sequence[Compared], lower_is_better: Sequence[str]) -> list[Compared]:
    """All rows of a table with their verdicts; a measurable one must also leave 0 outside."""
    adjusted = holm([row.p for row in rows])
    found = []
    for row, p in zip(rows, adjusted, strict=True):
        verdict: Verdict = "no measurable difference"
        if p < 1 - CONFIDENCE and not row.low <= 0 <= row.high:
            falls = row.difference < 0
            verdict = "better" if falls == (row.measure in lower_is_better) else "worse"
        found.append(replace(row, adjusted_p=p, verdict=verdict))
    return found


def fewest_differing(num_rows: int) -> int:
    """Of a table of so many comparisons: the fewest items that must differ, all one way, to show.

    Random signs of k items agree with chance 2 / 2**k, which the correction multiplies by the rows.
    """
    return next(k for k in range(1, 99) if 2 * num_rows / 2**k < 1 - CONFIDENCE)
