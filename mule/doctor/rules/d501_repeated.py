"""Data that is repeated.

What it sees: items equal to one before (by their digests, all of them), and items that share half of
their passages of 16 tokens with others (of at most 256 looked at). A fifth of the equal ones is a
warning, less than that, and near ones, notes: some data is made of phrases.
Why it matters: an epoch over rows that stand there twenty times is twenty epochs over the others'
places. The model learns them by heart, while it and the epoch count believe in fresh data; validation
rows held out at random have their twins in training.
What to do: leave duplicates out (`mule data mix FILES --out clean` does, near ones too); where rows are
repeated on purpose, lower train.epochs by the same factor.
Source: Lee et al. 2022 (arXiv 2107.06499); Hernandez et al. 2022 (arXiv 2205.10487): a tenth of the
data repeated a hundred times halves what a model is worth.
"""

from __future__ import annotations

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_MANY, _SOME, _NEAR = 0.2, 0.05, 0.5
_FEWEST_ITEMS = 20


def _check(history: History) -> Found | None:
    data = history.facts.get("data", {})
    if data.get("num_items", 0) < _FEWEST_ITEMS:
        return None
    equal, near = data["repeated_share"], data["nearly_repeated_share"]
    near = near if data["num_judged_items"] >= _FEWEST_ITEMS else 0.0
    if equal < _SOME and near < _NEAR:
        return None
    things = Message("conversations") if data["kind"] == "chat" else Message("documents")
    words = Message(
        "{:.0%} of the {:,} {} are equal to one before", equal, data["num_items"], things
    )
    if near >= _NEAR:
        words += Message(
            "; {:.0%} of those looked at share half of their passages with others", near
        )
    files = " ".join(history.recipe.data.train[:3])
    return Found(
        "warning" if equal >= _MANY else "note",
        1,
        words,
        Message("mule data mix {} --out clean, then data.train=[clean]", files),
        {"equal_share": equal, "near_share": near, "items": data["num_items"]},
    )


RULE = Rule("D501", "repeated data", _check, needs=("facts.data",))
