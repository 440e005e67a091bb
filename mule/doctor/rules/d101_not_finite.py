"""A loss or gradient that is not a number.

What it sees: updates refused because loss or gradient was NaN or infinite, weights that a
checkpoint would not take because they were not finite, and validation losses that are not finite.
Why it matters: the update would have destroyed the weights, and its rows were not learned. One
alone is a warning; several mean that arithmetic or weights are at their limit.
What to do: lower optim.learning_rate; in fp16 take train.precision=bf16 or fp32; look at the rows
that the updates had.
Source: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), section 5.1, on skipped batches;
Micikevicius et al. 2018 (arXiv 1710.03740), section 3.2, on the range of fp16.
"""

from __future__ import annotations

import re

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import lower_rate
from mule.message import Message, joined

_NOT_A_NUMBER = re.compile(r"\b(nan|-?inf|not finite)\b")
_SHOWN = 20


def _check(history: History) -> Found | None:
    refused = [
        event
        for event in history.events
        if event["kind"] in ("update refused", "rolled back")
        and _NOT_A_NUMBER.search(event["cause"])
    ]
    unmeasured = [
        row["step"] for row in history.rows if "val_loss" in row and row["val_loss"] is None
    ]
    if not refused and not unmeasured:
        return None
    steps = [event["step"] for event in refused]
    told = []
    if refused:
        told.append(
            Message(
                "{} of {} updates were refused ({!s})",
                len(refused),
                history.step,
                refused[0]["cause"],
            )
        )
    if unmeasured:
        told.append(Message("the validation loss was not finite {} times", len(unmeasured)))
    in_fp16 = history.recipe.train.precision == "fp16"
    return Found(
        "alarm" if len(steps) > 1 or unmeasured else "warning",
        min([*steps, *unmeasured]),
        joined("; ", told),
        "train.precision=fp32" if in_fp16 else lower_rate(history, 2),
        {"updates": steps[:_SHOWN], "validations": unmeasured[:_SHOWN]},
    )


RULE = Rule("D101", "not a number", _check, needs=())
