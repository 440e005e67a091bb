"""A router collapsed.

What it sees: the tokens of a block's experts are spread as over little more than the k experts that
every token gets anyway: exp(entropy of the load) is nearer to k than a quarter of the way to all E,
counted over the later third of what was reported.
Why it matters: the mixture is a dense model of k experts, with the memory of all of them. From there it
does not recover by itself.
What to do: start again with model.moe.balance=bias (or a larger model.moe.aux_loss), a z-loss, and a
lower optim.learning_rate or a longer warm-up: routers collapse in the first updates.
Source: Shazeer et al. 2017 (arXiv 1701.06538), section 4; Zoph et al. 2022 (arXiv 2202.08906).
"""

from __future__ import annotations

import math

from mule.doctor.experts import load, remedy
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_NEAR = 0.25


def _check(history: History) -> Found | None:
    found = load(history)
    if found is None or found.most <= 1:
        return None
    spread = {layer: _in_use(shares) for layer, shares in found.shares.items()}
    num = len(next(iter(found.shares.values())))
    least = num / found.most
    limit = least + _NEAR * (num - least)
    gone = [layer for layer, in_use in spread.items() if in_use < limit]
    if not gone:
        return None
    layer = min(gone, key=spread.__getitem__)
    return Found(
        "note" if history.kind == "adapter" else "alarm",
        found.step,
        Message(
            "in {} of {} blocks the router uses as good as "
            "{:.1f} of {} experts (each token gets {:.0f})",
            len(gone),
            len(spread),
            spread[layer],
            num,
            least,
        ),
        remedy(history),
        {"blocks": gone[:50], "in_use": spread[layer], "experts": num},
    )


def _in_use(shares: list[float]) -> float:
    """How many equally busy experts would spread the tokens as evenly: exp(entropy)."""
    total = sum(shares)
    parts = [share / total for share in shares if share > 0]
    return math.exp(-sum(part * math.log(part) for part in parts))


RULE = Rule("D703", "router collapse", _check, needs=("moe",))
