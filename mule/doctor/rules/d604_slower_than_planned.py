"""Slower than planned.

What it sees: an update takes more than two and a half times what `mule plan` expects of it on this
machine, without the time that others had the cores; half as much again is a note, and so is what others
take away. A machine that was never measured has no plan to compare with.
Why it matters: the run ends later than was reckoned with, and something is wrong that slows down every
run here: another program on the machine, a laptop on battery, a slow disk under the data.
What to do: end other programs, plug it in; measure the machine again (`mule plan RECIPE --fresh`); then
lower train.steps, or take what `mule plan` says of the time for granted no longer.
Source: docs/accuracy.md has the errors of the plan, measured: the limit is far beyond them.
"""

from __future__ import annotations

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_FEWEST_UPDATES, _WARMING = 30, 10
_FAR, _SOMEWHAT = 2.5, 1.5
_STARVED = 0.95  # of the time without a core: what is left says little about the run


def _check(history: History) -> Found | None:
    planned = history.facts.get("plan", {}).get("update_s")
    picked = history.pick("steps_per_second", "core_wait_share")
    rows = [(step, 1 / rate, waited or 0.0) for step, rate, waited in picked if rate][_WARMING:]
    if not planned or len(rows) < _FEWEST_UPDATES - _WARMING:
        return None
    took = signals.median([took for _, took, _ in rows])
    own = signals.median([(1 - waited) * took for _, took, waited in rows])
    if max(took, own) < _SOMEWHAT * planned:
        return None
    waited = signals.median([waited for _, _, waited in rows])
    is_far = own >= _FAR * planned and waited <= _STARVED
    others = "" if own >= _SOMEWHAT * planned else Message("; others on the machine had the cores")
    left = (history.num_steps - history.step) * took
    return Found(
        "warning" if is_far else "note",
        rows[0][0],
        Message("an update takes {:.3g} s, planned {:.3g} s{}", took, planned, others)
        + (Message("; {:,.0f} minutes are left", left / 60) if left > 60 else ""),
        Message("end what else uses the machine (top, nvidia-smi); plan again: mule plan RECIPE"),
        {"update_s": took, "own_update_s": own, "planned_s": planned},
    )


RULE = Rule("D604", "slower than planned", _check, needs=("steps_per_second", "facts.plan"))
