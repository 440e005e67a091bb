"""The gradient norm explodes.

What it sees: after the warm-up, the norm of the last eighth of the updates is more than ten times
the lowest level it had before, beyond 6 standard errors on the logarithmic scale, and above
optim.max_grad_norm. Norms that double or treble are usual, above all of adapters, whose gradient
begins at almost nothing.
Why it matters: clipping cuts the length of each update but not its direction, and a growing norm is
what comes before a loss that diverges.
What to do: lower optim.learning_rate to a half; warm up longer (optim.warmup_steps).
Source: Pascanu, Mikolov and Bengio 2013 (arXiv 1211.5063); Takase et al. 2023 (arXiv 2312.16903).
"""

from __future__ import annotations

import math

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History, Series
from mule.doctor.phases import after_warmup, block_error, lower_rate, recent
from mule.message import Message

_FEWEST_UPDATES = 24
_GROWN, _ERRORS = 10.0, 6.0


def _check(history: History) -> Found | None:
    norms = after_warmup(history, "grad_norm")
    if len(norms) < _FEWEST_UPDATES or min(norms.values) <= 0:
        return None
    logs = Series(norms.steps, [math.log(value) for value in norms.values])
    points = signals.smoothed(signals.thinned(logs), 2)
    last = recent(logs)
    past = signals.between(points, 0, last.steps[0] - 1)
    if not len(past):
        return None
    lowest, now = min(past.values), signals.median(last.values)
    least = max(math.log(_GROWN), _ERRORS * block_error(logs, len(points)))
    if now - lowest <= least or math.exp(now) <= history.recipe.optim.max_grad_norm:
        return None
    low_step = past.steps[past.values.index(lowest)]
    later = signals.between(points, low_step + 1, history.step)
    began = next(
        (s for s, v in zip(later.steps, later.values) if v - lowest > least), last.steps[0]
    )
    return Found(
        "warning",
        began,
        Message(
            "the gradient norm grew {:.0f}-fold, from {:.3g} (around update {}) to {:.3g}",
            math.exp(now - lowest),
            math.exp(lowest),
            low_step,
            math.exp(now),
        ),
        lower_rate(history, 2),
        {"lowest": math.exp(lowest), "lowest_step": low_step, "grad_norm": math.exp(now)},
    )


RULE = Rule("D201", "gradient norm exploding", _check, needs=("grad_norm",))
