"""The learning rate is too low.

What it sees: a curve that does not bend. With the first quarter of the learning rate spent the loss
had fallen by less than 42% of what it fell in all, with the first half by less than 64%: a straight
line has 25% and 50%, sound runs bend early and have more. It has not fallen by more than 35% yet.
Asked after 80 updates, 40 of them after the warm-up, and a quarter of the run; shorter runs are the
business of D305.
Why it matters: the model is still near where it began; the same updates at a higher rate teach
more.
What to do: three times optim.learning_rate; raise it again until the curve bends early.
Source: a step that is small against the curvature changes the loss in proportion to the rate
(first-order Taylor expansion); Smith 2018 (arXiv 1803.09820), section 4.1, on underfitting at low
rates.
"""

from __future__ import annotations

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import WEIGHT_SIZE, bend, higher_rate, peak_rate, warmup_steps
from mule.message import Message

_FEWEST_UPDATES, _AFTER_WARMUP, _SHARE = 80, 40, 0.25
_MOST = 0.35  # of the first loss: a run that fell so far has left its start


def _check(history: History) -> Found | None:
    fewest = (_FEWEST_UPDATES, warmup_steps(history) + _AFTER_WARMUP, _SHARE * history.num_steps)
    is_high = peak_rate(history) > WEIGHT_SIZE[history.kind] / 2  # learning is slow for that
    if history.step < max(fewest) or is_high:
        return None
    found = bend(history)
    if found is None or not found.is_straight or found.fall > _MOST * found.first:
        return None
    return Found(
        "warning",
        warmup_steps(history) + 1,
        Message(
            "the loss falls in a straight line: by {:.3f} from {:.3f}, "
            "{:.0%} of it with the first half of the learning rate spent",
            found.fall,
            found.first,
            found.half,
        ),
        higher_rate(history, 3),
        {
            "first_loss": found.first,
            "fall": found.fall,
            "quarter": found.quarter,
            "half": found.half,
        },
    )


RULE = Rule("D302", "learning rate too low", _check, needs=("loss", "learning_rate"))
