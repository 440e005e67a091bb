"""Overloaded experts.

What it sees: an expert whose tokens exceed its fair share by more than 80% of what is possible at all
(each token goes to k different experts, so that the most is E / k times the share), counted over the
later third of what was reported.
Why it matters: the others learn little, and on several devices all wait for the busiest one; with a
capacity, its tokens are dropped.
What to do: model.moe.balance=bias, or a larger model.moe.aux_loss; a router z-loss keeps its logits
small (model.moe.z_loss).
Source: Wang et al. 2024 (arXiv 2408.15664), MaxVio; Zoph et al. 2022 (arXiv 2202.08906), equation 5.
"""

from __future__ import annotations

from mule.doctor.experts import load, remedy
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_OVERLOADED = 0.8  # of the way from the fair share to all tokens


def _check(history: History) -> Found | None:
    found = load(history)
    if found is None or found.most <= 1:
        return None
    worst = {layer: (max(shares) - 1) / (found.most - 1) for layer, shares in found.shares.items()}
    over = [layer for layer, how_far in worst.items() if how_far > _OVERLOADED]
    if not over:
        return None
    layer = max(over, key=worst.__getitem__)
    return Found(
        "note" if history.kind == "adapter" else "warning",
        found.step,
        Message(
            "in {} of {} blocks one expert takes most of the tokens: in block "
            "{} {:.1f} times its share, of {:.1f} possible",
            len(over),
            len(worst),
            layer,
            max(found.shares[layer]),
            found.most,
        ),
        remedy(history),
        {"blocks": over[:50], "times": max(found.shares[layer]), "possible": found.most},
    )


RULE = Rule("D702", "overloaded experts", _check, needs=("moe",))
