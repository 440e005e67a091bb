"""Answers that repeat training rows word for word.

What it sees: answers to evaluate.prompts whose longest stretch that stands in the training rows has 32
tokens and more, or is all of an answer of 20 and more; a stretch that stands there more than 30 times is
a phrase of the data and does not count. A warning when half of the answers have such a long stretch, and
had not before training; short answers learned whole are a note, since a few set answers may be wanted.
Why it matters: the model recites. Private or protected text in the rows comes out again, and what reads
well is no sign of what it can do.
What to do: fewer epochs (the first checkpoint that recites is too late), fewer copies of the same row
(`mule data mix` leaves them out), more rows; and prompts that are not in the data.
Source: Carlini et al. 2021 (arXiv 2012.07805); Biderman et al. 2023 (arXiv 2304.11158): 32 tokens.
"""

from __future__ import annotations

from typing import Any

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_STRETCH, _WHOLE_ANSWER = 32, 20  # tokens
_PHRASE = 30  # times
_FEWEST_PROMPTS = 2


def _check(history: History) -> Found | None:
    samples = [sample for sample in history.samples if sample.get("copied")]
    if not samples or samples[-1]["step"] == 0:
        return None
    last, base = samples[-1], samples[0]
    recited = _recited(last)
    if not recited or _recited(base) == recited:
        return None
    lengths = [last["copied"][prompt][0] for prompt in recited]
    num_long = sum(length >= _STRETCH for length in lengths)
    is_grave = 2 * num_long >= len(last["copied"]) and num_long >= _FEWEST_PROMPTS
    first = next(s["step"] for s in samples if s["step"] and _recited(s))
    epochs = history.series("epoch").values
    return Found(
        "warning" if is_grave else "note",
        first,
        Message(
            "{} of {} answers repeat training rows word for word, up to {} tokens of them",
            len(recited),
            len(last["copied"]),
            max(lengths),
        ),
        Message(
            "train.steps={}, or more rows; mule data mix leaves repeated ones out",
            max(1, first // 2),
        ),
        {"prompts": recited[:5], "longest": max(lengths), "epochs": epochs[-1:]},
    )


def _recited(sample: dict[str, Any]) -> list[str]:
    found = []
    for prompt, (length, times) in sample["copied"].items():
        whole = length >= max(_WHOLE_ANSWER, sample["tokens"][prompt])
        if (length >= _STRETCH or whole) and 0 < times <= _PHRASE:
            found.append(prompt)
    return found


RULE = Rule("D404", "answers recite training rows", _check, needs=("samples",))
