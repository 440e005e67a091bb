"""Rows in their order on the disk.

What it sees: the places of the first epoch and the rows that stand there go together (a correlation
above 0.8; Mule shuffles by (seed, epoch), which gives 0); or, of rows of different lengths, the number
of trained tokens of neighbouring updates does.
Why it matters: files are sorted by source, by length or by subject. Updates then follow one subject
after the other: the model forgets the first by the last, the loss shows the data's order instead of
what was learned, and the last subject decides.
What to do: read the rows through mule.data.loader, whose order is a function of (seed, epoch); of rows
that another program orders, shuffle the file (`mule data mix FILES --out mixed`).
Source: Bengio 2012 (arXiv 1206.5533), section 3.2; Mule's order: docs/architecture.md.
"""

from __future__ import annotations

import itertools
import math

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History, Series
from mule.message import Message

_ORDERED = 0.8
_FEWEST_UPDATES, _DEVIATIONS = 40, 6


def _check(history: History) -> Found | None:
    order = history.facts.get("data", {}).get("order_correlation")
    if order is not None and abs(order) > _ORDERED:
        return _found(
            Message("row number and place in the epoch go together: {:.2f}", order), history, order
        )
    together = _with_the_next(history.series("num_targets"))
    if together is not None and order is None:
        said = Message(
            "the trained tokens of an update and of the next go together: {:.2f}", together
        )
        return _found(said, history, together)
    return None


def _found(said: str, history: History, figure: float) -> Found:
    files = " ".join(history.recipe.data.train[:3])
    return Found(
        "warning",
        1,
        Message(
            "the rows come in their order on the disk, not shuffled ({}; shuffled rows have 0)",
            said,
        ),
        Message("mule data mix {} --out mixed, then data.train=[mixed]", files),
        {"correlation": figure},
    )


def _with_the_next(targets: Series) -> float | None:
    """The correlation of neighbours where it is beyond chance and strong; None of a shuffled run."""
    values = targets.values
    count = len(values)
    if count < _FEWEST_UPDATES:
        return None
    mean = sum(values) / count
    square = sum((value - mean) ** 2 for value in values)
    if square < 1e-6 * mean**2 * count:  # all rows are full
        return None
    found = sum((a - mean) * (b - mean) for a, b in itertools.pairwise(values)) / square
    return found if found > max(_ORDERED, _DEVIATIONS / math.sqrt(count)) else None


RULE = Rule("D502", "rows not shuffled", _check, needs=("num_targets",))
