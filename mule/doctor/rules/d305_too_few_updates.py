"""Too few updates for the schedule.

What it sees: a finished run of fewer than 60 updates whose curve does not bend (as D302 has it): it
was still at its start. Or fewer updates than AdamW's memory of the squared gradient has, 1 / (1 -
beta2): a warning while the loss still fell in the later half, else a note.
Why it matters: the learning rate goes up and down again before the model has learned what the data
offers.
What to do: more updates from the same data: fewer rows in each (train.step_rows, below), or more
epochs.
Source: Kingma and Ba 2015 (arXiv 1412.6980), section 3, on the time a moment takes;
docs/fine-tuning-runs.md on how Mule chooses the length.
"""

from __future__ import annotations

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import bend
from mule.message import Message

_FEW = 60
_WANTED = 100  # updates
_FEWEST_VALIDATIONS, _SOMETHING = 4, 0.005


def _check(history: History) -> Found | None:
    total = history.num_steps
    if not history.is_over or total >= _FEW:
        return None
    memory = 1 / (1 - history.recipe.optim.beta2)
    found = bend(history)
    straight = found is not None and found.is_straight
    if not straight and total >= memory:
        return None
    rows = history.recipe.train.step_rows or 1
    fewer = max(1, rows * total // _WANTED)
    what = Message("the run has {} updates", total)
    if found is not None and straight:
        what += Message(", and the second half still brought {:.0%} of the fall", 1 - found.half)
    else:
        what += Message(", fewer than the {:.0f} that AdamW's second moment remembers", memory)
    return Found(
        "warning" if straight or _is_falling(history) else "note",
        history.step,
        what,
        f"train.step_rows={fewer}" if fewer < rows else f"train.steps={_WANTED}",
        {"updates": total, "step_rows": rows, "memory": memory},
    )


def _is_falling(history: History) -> bool:
    """Whether the later half still brought something: in validation, else beyond the noise."""
    loss, valid = history.series("loss"), history.series("val_loss")
    if len(valid) >= _FEWEST_VALIDATIONS:
        fall = valid.values[len(valid) // 2 - 1] - valid.values[-1]
        return fall > _SOMETHING * valid.values[0]
    before, last = (signals.median(part.values) for part in signals.parts(loss, 3)[1:])
    error = 1.25 * signals.noise(loss.values) * (6 / len(loss)) ** 0.5
    return before - last > 2 * error


RULE = Rule("D305", "too few updates", _check)
