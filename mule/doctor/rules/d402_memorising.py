"""The rows are learned by heart.

What it sees: in its later epochs a training loss that has fallen to a tenth of where it began and below
0.25 nats a token, on rows that were seen twice and more; and, where there is validation, a validation
loss at least three times as high. Loss that low on rows never seen before would be another rule's.
Why it matters: the model gives the rows back. It answers the questions of the file, and little else;
names and numbers in the rows can be drawn out of it again.
What to do: fewer epochs, or more and more different rows; hold some out (data.valid_share=0.1), so that
the point where learning turns into memory is seen, and let evaluate.patience=2 end the run there.
Source: Carlini et al. 2023 (arXiv 2202.07646): what is repeated is remembered; Tirumala et al. 2022
(arXiv 2205.10770).
"""

from __future__ import annotations

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import recent, start
from mule.message import Message

_LEAST_EPOCHS = 2.0
_KNOWN, _SHARE_OF_FIRST = 0.25, 0.1  # nats a token
_BESIDE_VALIDATION = 3.0


def _check(history: History) -> Found | None:
    loss, epochs = history.series("loss"), history.series("epoch")
    if len(loss) < 16 or epochs.values[-1] < _LEAST_EPOCHS:
        return None
    first, now = signals.median(start(loss).values), signals.median(recent(loss, 0.05).values)
    if now >= _KNOWN or now >= _SHARE_OF_FIRST * first:
        return None
    valid = history.series("val_loss")
    if len(valid) and valid.values[-1] < _BESIDE_VALIDATION * now:
        return None
    begun = next(s for s, v in zip(loss.steps, loss.values) if v < _KNOWN)
    beside = Message(" (validation: {:.3f})", valid.values[-1]) if len(valid) else ""
    fewer = max(1, round(history.step / epochs.values[-1]))
    hold_out = "" if len(valid) else " data.valid_share=0.1"
    return Found(
        "warning",
        begun,
        Message(
            "the training loss is {:.3f}{} after {:.1f} passes over the "
            "same rows, {:.2f} at the start: they are known by heart",
            now,
            beside,
            epochs.values[-1],
            first,
        ),
        Message(
            "train.steps={}{}: one pass, and as many more as validation allows", fewer, hold_out
        ),
        {"loss": now, "first_loss": first, "epochs": epochs.values[-1]},
    )


RULE = Rule("D402", "learned by heart", _check, needs=("loss", "epoch"))
