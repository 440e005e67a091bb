"""The learning rate is too high.

What it sees: (a) a rate above 0.02 (0.03 for an adapter): an update of AdamW moves each weight by
about the rate, and weights begin with a standard deviation of 0.02, so that every update replaces
them; (b) a loss at the full rate that lies above what it was before, at the start or in the
warm-up, by more than 6 standard errors and 4%, and stays there for a tenth of the run or more; (c)
a loss that stands still at the full rate, and falls by a tenth only as the rate goes down, faster
than it ever did before.
Why it matters: steps overshoot. In fine-tuning what the base knew is lost in the first updates, and
what is learned afterwards does not bring it back; in pretraining the updates at the full rate are
wasted.
What to do: a third of optim.learning_rate, a tenth where it is beyond the weights themselves; with
a rate that must be high, a longer optim.warmup_steps.
Source: Kingma and Ba 2015 (arXiv 1412.6980), section 2.1, on the length of a step; Smith 2018
(arXiv 1803.09820), section 4; Wortsman et al. 2023 (arXiv 2309.14322), section 3.1.
"""

from __future__ import annotations

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History, Series
from mule.doctor.phases import WEIGHT_SIZE, block_error, lower_rate, peak_rate, warmup_steps
from mule.message import Message

_FEWEST_UPDATES = 20
_FULL_RATE = 0.5  # share of the peak
_ERRORS, _LEAST_RISE, _STAYED = 6.0, 0.04, 0.1
_STOOD, _LATE_FALL, _FASTER = 0.01, 0.1, 2.0


def _check(history: History) -> Found | None:
    loss = history.series("loss")
    if beyond := _beyond_the_weights(history):
        return beyond
    if len(loss) < _FEWEST_UPDATES:
        return None
    peak, rates = peak_rate(history), history.series("learning_rate")
    warm = warmup_steps(history)
    full = [s for s, v in zip(rates.steps, rates.values) if s >= warm and v >= _FULL_RATE * peak]
    if not full:
        return None
    high = signals.between(loss, full[0], full[-1])
    return _above_the_start(history, loss, high) or _falls_only_late(history, loss, high)


def _beyond_the_weights(history: History) -> Found | None:
    """A rate that is as large as the weights it changes."""
    rates, limit = history.series("learning_rate"), WEIGHT_SIZE[history.kind]
    rate = max(peak_rate(history), max(rates.values))
    if rate <= limit:
        return None
    return Found(
        "warning",
        next((s for s, v in zip(rates.steps, rates.values) if v > limit), rates.steps[0]),
        Message(
            "a learning rate of {:.2g}: each update moves every weight by about as much, and weights "
            "are about {:g} large",
            rate,
            limit,
        ),
        lower_rate(history, 10),
        {"learning_rate": rate, "limit": limit},
    )


def _above_the_start(history: History, loss: Series, high: Series) -> Found | None:
    """A loss that lies above the lowest of its first updates for a good part of the run."""
    before = signals.between(loss, 0, max(3, high.steps[0]) if len(high) else 3)
    points = signals.smoothed(before, 3)
    lowest = min(points.values[min(2, len(points) - 1) :])
    size = min(3, len(before))
    error = signals.noise(loss.values) / size**0.5
    limit = lowest + max(_ERRORS * error, _LEAST_RISE * lowest)
    level = signals.thinned(high, max(1, len(high) // max(5, round(0.02 * len(loss)))))
    above = [s for s, v in zip(level.steps, level.values) if v > limit]
    updates = round(len(above) * len(high) / max(1, len(level)))
    if updates < max(5, _STAYED * len(loss)):
        return None
    highest = max(level.values)
    return Found(
        "warning",
        above[0],
        Message(
            "at the full learning rate the loss rose from {:.3f} to {:.3f}, and lay above "
            "the start for {} updates",
            lowest,
            highest,
            updates,
        ),
        lower_rate(history, 3),
        {"lowest_before": lowest, "highest": highest, "updates_above": updates},
    )


def _falls_only_late(history: History, loss: Series, high: Series) -> Found | None:
    """A loss that stands still at the full rate and falls when the rate does."""
    late = signals.between(loss, high.steps[-1] + 1, history.step) if len(high) else high
    middle = signals.parts(high, 2)[1]
    if len(late) < _FEWEST_UPDATES or len(middle) < _FEWEST_UPDATES:
        return None
    line, ending = signals.trend(middle), signals.trend(late)
    level, error = signals.median(middle.values), block_error(middle, 4)
    fallen = level - signals.median(late.values[-max(5, len(late) // 4) :])
    chance = 3 * line.error * (middle.steps[-1] - middle.steps[0])
    stood = line.first - line.last < max(chance, _STOOD * level)
    if not stood or fallen < max(_ERRORS * error, _LATE_FALL * level):
        return None
    if ending.slope >= _FASTER * min(line.slope, 0.0):
        return None
    return Found(
        "warning",
        middle.steps[0],
        Message(
            "the loss stood at {:.3f} at the full learning rate, and fell by {:.3f} only when "
            "the rate went down",
            level,
            fallen,
        ),
        lower_rate(history, 3),
        {"loss_at_full_rate": level, "late_fall": fallen},
    )


RULE = Rule("D301", "learning rate too high", _check, needs=("loss", "learning_rate"))
