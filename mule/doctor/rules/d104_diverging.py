"""The loss climbs away from its best.

What it sees: the level of the last eighth of the updates lies above the lowest level before, by
more than 6 standard errors, 4% of the loss and a tenth of all that had been learned; and by 10% of
the loss or a quarter of what had been learned. Or it did so after the first eighth of the run, by
10% of the loss for a twelfth of the run or more, and has come back since.
Why it matters: training undoes what it did. Once the level passes that of the first updates the
model is worse than what it started from: an alarm.
What to do: stop, go back to the best checkpoint (mule train ... model.path=RUN takes it), and train
on with half the learning rate, or with a lower optim.max_grad_norm.
Source: Zhang et al. 2022 (OPT, arXiv 2205.01068), section 2.5: divergences were ended by a lower
rate from an earlier checkpoint; Wortsman et al. 2023 (arXiv 2309.14322).
"""

from __future__ import annotations

import math

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History, Series
from mule.doctor.phases import block_error, lower_rate, recent, start
from mule.message import Message

_FEWEST_UPDATES, _FEWEST_TO_COME_BACK = 20, 96
_ERRORS, _LEAST_RISE, _LEAST_OF_FALL = 6.0, 0.04, 0.1
_GREAT_RISE, _GREAT_OF_FALL = 0.1, 0.25  # one of them
_A_RISE = 0.03  # of a block beside a great one
_LOST = 0.75  # of the fall


def _check(history: History) -> Found | None:
    loss = history.series("loss")
    if len(loss) < _FEWEST_UPDATES:
        return None
    points = signals.smoothed(signals.thinned(loss), 2)
    last = recent(loss)
    past = signals.between(points, 0, last.steps[0] - 1)
    if not len(past):
        return None
    lowest = min(past.values)
    best_step = past.steps[past.values.index(lowest)]
    first = signals.median(start(loss).values)
    now = signals.median(last.values)
    error = block_error(loss, len(points))
    fall = first - lowest
    great = min(_GREAT_RISE * lowest, _GREAT_OF_FALL * fall)
    least = max(_ERRORS * error, _LEAST_RISE * lowest, _LEAST_OF_FALL * fall, great)
    if now - lowest <= least:
        return _came_back(history, signals.thinned(loss), error)
    later = signals.between(points, best_step + 1, history.step)
    began = next(
        (s for s, v in zip(later.steps, later.values) if v - lowest > least), last.steps[0]
    )
    lost = now >= first - (1 - _LOST) * fall
    return Found(
        "alarm" if lost else "warning",
        began,
        Message(
            "the loss rose from {:.3f} (around update {}) to {:.3f} in the last {} updates",
            lowest,
            best_step,
            now,
            len(last),
        )
        + (Message("; it began at {:.3f}", first) if lost else ""),
        lower_rate(history, 2),
        {
            "lowest": lowest,
            "lowest_step": best_step,
            "loss": now,
            "first_loss": first,
            "error": error,
        },
    )


def _came_back(history: History, points: Series, error: float) -> Found | None:
    """A rise that is over: two neighbouring blocks or more, one of them far above the lowest before."""
    if history.step < _FEWEST_TO_COME_BACK:
        return None
    lowest, rise = math.inf, list[tuple[int, float]]()
    for place, (step, value) in enumerate(zip(points.steps, points.values)):
        if place >= len(points) / 8 and value - lowest > max(4 * error, _A_RISE * lowest):
            rise.append((step, value))
            continue
        if len(rise) > 1 and max(v for _, v in rise) > (1 + _GREAT_RISE) * lowest + 6 * error:
            break
        lowest, rise = min(lowest, value), []
    else:
        return None
    began, highest = rise[0][0], max(value for _, value in rise)
    return Found(
        "warning",
        began,
        Message(
            "the loss rose from {:.3f} to {:.3f} at update {}, and was back only at update {}",
            lowest,
            highest,
            began,
            step,
        ),
        lower_rate(history, 2),
        {"lowest": lowest, "highest": highest, "back_at": step, "error": error},
    )


RULE = Rule("D104", "loss diverging", _check)
