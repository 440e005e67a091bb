"""The share of trained tokens is too small.

What it sees: of the tokens in the rows, as the trainer gets them, less than 8% are trained (15%: a
note); or, a warning too, one row in ten has none at all. In a chat it is the answers that are trained,
usually 20% to 70% of the tokens.
Why it matters: everything else is only read. An update of a thousand tokens with thirty targets costs
as much as one with a thousand, and its gradient is as noisy as one of thirty.
What to do: look at the coloured tokens with `mule data preview RECIPE`; shorten prompts, or put several
questions into one chat; where answers of one word are meant, raise train.step_examples.
Source: standard.md of the label contract: the share of trained tokens is shown before an update is made;
Shi et al. 2024 (arXiv 2405.14394): with short answers and long prompts, training on prompts too helps.
"""

from __future__ import annotations

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_TOO_SMALL, _SMALL, _EMPTY_ROWS = 0.08, 0.15, 0.1


def _check(history: History) -> Found | None:
    labels = history.facts.get("labels", {})
    share, empty = labels.get("trained_share"), labels.get("empty_rows_share", 0.0)
    if share is None or (share >= _SMALL and empty < _EMPTY_ROWS):
        return None
    targets = history.series("num_targets").values
    an_update = Message(", {:.0f} in the first update", targets[0]) if targets else ""
    rows = Message("; {:.0%} of the rows have none", empty) if empty else ""
    examples = history.facts["data"]["rows_per_update"] * 4
    return Found(
        "warning" if share < _TOO_SMALL or empty >= _EMPTY_ROWS else "note",
        1,
        Message("{:.1%} of the tokens are trained{}{}", share, an_update, rows),
        Message(
            "mule data preview RECIPE; if the short answers are meant, train.step_rows={}", examples
        ),
        {"trained_share": share, "empty_rows_share": empty},
    )


RULE = Rule("D503", "few trained tokens", _check, needs=("facts.labels",))
