"""The warm-up is too short.

What it sees: a loss that shoots up when the full rate is reached, above its first updates by more
than 6 standard errors and 4%, and comes back within the first tenth of the run; the warm-up was
shorter than 5% of it.
Why it matters: AdamW's second moment is not settled yet, so that the first updates are too long.
What the base knew, or what the first updates learned, is lost and learned again.
What to do: optim.warmup_steps of 5% of the run, 20 updates at least; or a lower rate, when the loss
does not come back soon (D301).
Source: Liu et al. 2020 (RAdam, arXiv 1908.03265); Ma and Yarats 2021 (arXiv 1910.04209): 2/(1 -
beta2) updates of warm-up.
"""

from __future__ import annotations

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import warmup_steps
from mule.message import Message

_FEWEST_UPDATES = 60
_USUAL, _LEAST = 0.05, 20
_ERRORS, _LEAST_RISE, _STAYED, _FEWEST_ABOVE = 6.0, 0.04, 0.1, 3


def _check(history: History) -> Found | None:
    loss, warm = history.series("loss"), warmup_steps(history)
    usual = max(_LEAST, round(_USUAL * history.num_steps))
    if len(loss) < _FEWEST_UPDATES or warm >= usual:
        return None
    first = signals.median(loss.values[: max(1, min(3, warm))])
    begin = signals.smoothed(loss, 3)
    limit = first + max(_ERRORS * signals.noise(loss.values), _LEAST_RISE * first)
    above = [s for s, v in zip(begin.steps, begin.values) if v > limit]
    stayed = len(above) >= max(5, _STAYED * len(loss))
    if len(above) < _FEWEST_ABOVE or stayed or above[-1] > warm + 2 * usual:
        return None
    highest = max(begin.values)
    return Found(
        "warning",
        above[0],
        Message(
            "after a warm-up of {} updates the loss shot up from {:.3f} to {:.3f}, and "
            "was back after update {}",
            warm,
            first,
            highest,
            above[-1],
        ),
        f"optim.warmup_steps={usual}",
        {"warmup_steps": warm, "first_loss": first, "highest": highest, "back_at": above[-1]},
    )


RULE = Rule("D303", "warm-up too short", _check)
