"""Many examples are cut off or left out.

What it sees: of the examples of the training data, those longer than data.max_seq_length. A fifth of
them cut off (data.too_long=truncate), or more than half left out (drop), is a warning; a twentieth of
either is a note: a run can be sound without its longest rows, and preparing the data has said so.
Why it matters: a cut answer teaches to stop thinking in the middle, or not to stop; and what is left out
is not chance: the longest answers, often the best.
What to do: raise data.max_seq_length; memory grows with it, for which train.activation_checkpointing
and a smaller train.micro_batch_rows make room.
Source: huggingface/trl issue 2400 (a length that truncates without a word).
"""

from __future__ import annotations

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_MANY_CUT, _MANY_DROPPED, _SOME = 0.2, 0.5, 0.05


def _check(history: History) -> Found | None:
    data = history.facts.get("data", {})
    cut, dropped = data.get("num_truncated", 0), data.get("num_dropped", 0)
    total = data.get("num_examples", 0) + dropped
    if cut + dropped < _SOME * max(total, 1):
        return None
    is_grave = cut >= _MANY_CUT * total or dropped > _MANY_DROPPED * total
    length = history.recipe.data.max_seq_length
    return Found(
        "warning" if is_grave else "note",
        1,
        Message(
            "of {:,} examples {:,} were cut off and {:,} left out: they are longer than "
            "{:,} tokens",
            total,
            cut,
            dropped,
            length,
        ),
        f"data.max_seq_length={2 * length}",
        {"truncated": cut, "dropped": dropped, "examples": total},
    )


RULE = Rule("D505", "examples cut or left out", _check, needs=("facts.data",))
