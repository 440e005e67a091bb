"""A loss of nothing.

What it sees: (a) a training loss of almost zero on rows that were never seen before (in the first
epoch), or together with a validation loss of almost zero; (b) in the first epoch, a training loss
below half the validation loss, which does not fall.
Why it matters: no model foretells unseen text, and in the first epoch training rows are as new as
those of validation. The targets are in the input (not shifted, or leaked), or there is hardly a
target to learn. What is measured then says nothing about answers. A loss that falls to zero over
many epochs, while validation does not, is learning by heart and another rule's.
What to do: look at what is trained, with `mule data preview RECIPE`: the coloured tokens must be
the answers, and an answer must not stand in its question.
Source: unslothai/unsloth issues 712 and 3006 (the loss drops to zero and stays); Shannon 1951:
English keeps about one bit a letter.
"""

from __future__ import annotations

from typing import Any

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History, Series
from mule.doctor.phases import recent
from mule.message import Message

_NOTHING = {"pretrain": 0.1, "fine-tune": 0.02, "adapter": 0.02}  # nats a token
_FEWEST_UPDATES, _FEWEST_VALIDATIONS = 8, 2
_HALF = 0.5


def _check(history: History) -> Found | None:
    loss = history.series("loss")
    if len(loss) < _FEWEST_UPDATES:
        return None
    return _nothing(history, loss) or _unlike_validation(history, loss)


def _nothing(history: History, loss: Series) -> Found | None:
    """A loss of almost zero, on new rows or on held-out ones as well."""
    valid, least = history.series("val_loss"), _NOTHING[history.kind]
    now = recent(loss, 0.02)
    level = signals.median(now.values)
    if level >= least:
        return None
    zero = next((s for s, v in zip(loss.steps, loss.values) if v < least), now.steps[0])
    epochs = signals.between(history.series("epoch"), zero, zero).values
    is_new = bool(epochs) and epochs[0] <= 1
    held_out = len(valid) > 0 and valid.values[-1] < 2 * least
    if not is_new and not held_out:
        return None
    beside = Message(", the validation loss {:.4f}", valid.values[-1]) if held_out else ""
    return _found(
        zero,
        Message("the training loss is {:.4f}{}", level, beside),
        {"loss": level, "below": least, "epoch": epochs[0] if epochs else None},
    )


def _unlike_validation(history: History, loss: Series) -> Found | None:
    """In the first epoch, a loss that falls far below a validation loss that does not fall."""
    epochs, valid = history.series("epoch"), history.series("val_loss")
    ends = [step for step, epoch in zip(epochs.steps, epochs.values) if epoch <= 1]
    valid = signals.between(valid, 0, ends[-1] if ends else 0)
    if len(valid) < _FEWEST_VALIDATIONS:
        return None
    for place in range(1, len(valid)):
        at, validated = valid.steps[place], valid.values[place]
        level = signals.median(recent(signals.between(loss, 0, at), 0.05).values)
        if level < _HALF * validated and validated >= min(valid.values[:place]):
            break
    else:
        return None
    return _found(
        at,
        Message(
            "in the first epoch, on rows it had never seen, the training loss was {:.3f}, while the "
            "validation loss was {:.3f} and did not fall",
            level,
            validated,
        ),
        {"loss": level, "val_loss": validated},
    )


def _found(step: int, what: str, evidence: dict[str, Any]) -> Found:
    what += Message(": the answer stands in the input, or hardly anything is trained")
    return Found("alarm", step, what, "mule data preview RECIPE", evidence)


RULE = Rule("D105", "loss of zero", _check)
