"""Throughput drops.

What it sees: tokens a second, without the time that others had the cores (`core_wait_share`, which
Linux tells): in the last twentieth of the updates (8 at least) all below half of the best earlier third
of the run, or below 65% after a fall that went on through the whole later half (a trend of 10 standard
errors). What others on the machine take away is a note: it is no fault of the run; where the system does
not tell, less than a quarter is a warning.
Why it matters: a run that slows down ends late or never. Heat, swap, a full disk cache and something
that grows in every update look like this.
What to do: look at temperature and clock (nvidia-smi -q -d PERFORMANCE, or sensors), at swap and disk;
a resumed run tells whether the process itself is the cause: then it begins fast again.
Source: PyTorch's performance tuning guide; Documentation/scheduler/sched-stats.rst of Linux for the time
in which a thread waits for a core.
"""

from __future__ import annotations

import itertools

from mule.doctor import signals
from mule.doctor.finding import Found, Rule, Severity
from mule.doctor.history import History, Series, series_of
from mule.doctor.phases import recent
from mule.message import Message

_FEWEST_UPDATES = 48  # rates are means over 20
_DROPPED, _FALLING, _DROPPED_FAR = 0.5, 0.65, 0.25
_ERRORS = 10.0
_RECENT = 0.05
_STARVED = 0.95  # of the time without a core: what is left says little about the run
_FEWEST_RECENT = 8
_WARMING = 20  # the first window has compilation and cold caches in it


def _check(history: History) -> Found | None:
    rates, own = _rates(history)
    if len(rates) < _FEWEST_UPDATES:
        return None
    looks: tuple[tuple[Series, Severity], ...] = ((own, "warning"), (rates, "note"))
    for series, severity in looks:
        if len(series) < _FEWEST_UPDATES or (dropped := _dropped(series)) is None:
            continue
        best, now, step = dropped
        if not len(own) and now < _DROPPED_FAR * best:
            severity = "warning"
        told = len(own) and severity == "note"
        others = Message("; others on the machine had the cores") if told else ""
        return Found(
            severity,
            step,
            Message(
                "{:,.0f} tokens a second, after {:,.0f} earlier in the run{}", now, best, others
            ),
            Message("nice, or another time: the run itself is as fast as before")
            if severity == "note"
            else Message(
                "mule train RUN/recipe.yaml --resume: if it begins fast again, something "
                "grows in the process; else look at heat, swap and disk"
            ),
            {"best": best, "now": now},
        )
    return None


def _dropped(series: Series) -> tuple[float, float, int] | None:
    """(the best earlier third's median, the recent highest, where it fell below) of a lasting drop."""
    last = recent(series, _RECENT, _FEWEST_RECENT)
    count = len(series) - len(last)
    before = Series(series.steps[:count], series.values[:count])
    thirds = [part for part in signals.parts(before, 3) if len(part)]
    best = max(signals.median(part.values) for part in thirds)
    now = max(last.values)
    falls_on = signals.trend(signals.parts(series, 2)[1]).errors < -_ERRORS
    limit = (_FALLING if falls_on else _DROPPED) * best
    if now >= limit:
        return None
    place = len(series)
    while place and series.values[place - 1] < limit:
        place -= 1
    return best, signals.median(last.values), series.steps[min(place, len(series) - 1)]


def _rates(history: History) -> tuple[Series, Series]:
    """Tokens a second of the newest attempt as they were, and as if nobody else had been there."""
    rows = history.pick("tokens_per_second", "core_wait_share", of_attempt=history.newest_attempt)
    known = [row for row in itertools.islice(rows, _WARMING, None) if row[1]]
    own = (
        (step, rate / (1 - waited))
        for step, rate, waited in known
        if waited is not None and waited <= _STARVED
    )
    return series_of((step, rate) for step, rate, _ in known), series_of(own)


RULE = Rule("D603", "throughput drops", _check, needs=("tokens_per_second",))
