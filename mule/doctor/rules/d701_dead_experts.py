"""Dead experts.

What it sees: experts that get less than 2% of their fair share of the tokens, counted over the later
third of what was reported, at least three reports and two hundred tokens for each expert.
Why it matters: a dead expert takes memory, is saved and served, and does nothing; the model is smaller
than it is paid for. It seldom comes back: without tokens it gets no gradient, and no tokens follow.
What to do: balance the experts: model.moe.balance=aux with a larger model.moe.aux_loss, or =bias; a
lower learning rate in the first updates; fewer experts.
Source: Fedus et al. 2021 (arXiv 2101.03961), section 2.2; Wang et al. 2024 (arXiv 2408.15664).
"""

from __future__ import annotations

from mule.doctor.experts import load, remedy
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_DEAD = 0.02  # of the fair share


def _check(history: History) -> Found | None:
    found = load(history)
    if found is None:
        return None
    dead = [
        (layer, expert)
        for layer, shares in found.shares.items()
        for expert, share in enumerate(shares)
        if share < _DEAD
    ]
    if not dead:
        return None
    layers = sorted({layer for layer, _ in dead})
    total = sum(map(len, found.shares.values()))
    return Found(
        "note" if history.kind == "adapter" else "warning",
        found.step,
        Message(
            "{} of {} experts get less than {:.0%} of their share of the tokens (in "
            "the blocks {}{})",
            len(dead),
            total,
            _DEAD,
            ", ".join(map(str, layers[:6])),
            ", ..." if len(layers) > 6 else "",
        ),
        remedy(history),
        {"dead": dead[:50], "reports": found.num_reports},
    )


RULE = Rule("D701", "dead experts", _check, needs=("moe",))
