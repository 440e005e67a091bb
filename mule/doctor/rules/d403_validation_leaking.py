"""Validation rows that were trained on.

What it sees: held-out items that stand in the training data, word for word or in half of their passages
of 16 tokens; looked up when the run begins, of at most 256 items, in at most 16 million tokens. Passages
that many items share, as prompts and licences do, do not count; nor do those of data made of phrases,
where training items are as near to each other as held-out ones are to them. From 5% on it is a warning.
Why it matters: the validation loss is better than the model is, overfitting is seen late or never, and
evaluate.patience waits for a rise that does not come.
What to do: remove data.valid, so that Mule holds out a share itself (equal items stay on one side); or
keep the rows of a given data.valid out of the training data: `mule data mix --decontaminate`.
Source: Brown et al. 2020 (GPT-3), appendix C; Lee et al. 2022 (arXiv 2107.06499), section 5.
"""

from __future__ import annotations

import math

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_MANY, _FEWEST = 0.05, 2
_ERRORS = 3.0


def _check(history: History) -> Found | None:
    data = history.facts.get("data", {})
    if not (asked := data.get("num_valid_items")):
        return None
    equal, judged = data["valid_repeated"], data["num_judged_valid_items"]
    near = data["valid_nearly_repeated"]
    share = max(equal / asked, _beyond_phrases(near, judged, data["nearly_repeated_share"]))
    if share < _MANY and not equal:
        return None
    is_grave = share >= _MANY and max(equal, near) >= _FEWEST
    scanned = data["scanned_share"]
    part = "" if scanned == 1 else Message(", looked for in {:.0%} of them", scanned)
    return Found(
        "warning" if is_grave else "note",
        1,
        Message(
            "{:,} of {:,} validation items are training items word for word, and {:,} "
            "of {:,} long ones share half of their passages with the training rows{}",
            equal,
            asked,
            near,
            judged,
            part,
        ),
        _remedy(history),
        {"equal": equal, "items": asked, "near": near, "judged": judged},
    )


def _beyond_phrases(near: int, judged: int, usual: float) -> float:
    """The share of nearly equal items beyond what is usual among training items, and beyond chance."""
    if not judged:
        return 0.0
    share = near / judged
    error = math.sqrt(usual * (1 - usual) / judged)
    return share - usual if share > usual + _ERRORS * error else 0.0


def _remedy(history: History) -> str:
    files = history.recipe.data.train
    if given := history.recipe.data.valid:
        clean = f"mule data mix {files[0]} --out clean --decontaminate {given[0]}"
        return Message(
            "{}, then data.train=[clean]; or remove data.valid and set data.valid_share=0.1", clean
        )
    return Message("mule data mix {} --out clean, which leaves near duplicates out", files[0])


RULE = Rule("D403", "validation was trained on", _check, needs=("facts.data",))
