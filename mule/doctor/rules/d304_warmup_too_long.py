"""The warm-up is too long for the run.

What it sees: more than a quarter of the updates, and more than five, are warm-up.
Why it matters: the schedule has hardly a stretch at the full rate; most updates are made at a rate
far below the one that was chosen. It happens when a warm-up is copied from a longer recipe.
What to do: optim.warmup_steps of 5% of the run.
Source: the published recipes keep it at 1 to 10% (Alpaca 3%, OLMo 2, SmolLM2); Hägele et al. 2024
(arXiv 2405.18392), appendix, on its length.
"""

from __future__ import annotations

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import peak_rate, warmup_steps
from mule.message import Message

_MOST, _FEW = 0.25, 5
_USUAL = 0.05


def _check(history: History) -> Found | None:
    warm, total = warmup_steps(history), history.num_steps
    if warm <= max(_FEW, _MOST * total):
        return None
    return Found(
        "warning",
        1,
        Message(
            "the warm-up takes {} of {} updates ({:.0%}); the rate of "
            "{:.2g} is reached when most of the run is over",
            warm,
            total,
            warm / total,
            peak_rate(history),
        )
        if warm > total / 2
        else Message("the warm-up takes {} of {} updates ({:.0%})", warm, total, warm / total),
        f"optim.warmup_steps={max(1, round(_USUAL * total))}",
        {"warmup_steps": warm, "updates": total},
    )


RULE = Rule("D304", "warm-up too long", _check, needs=())
