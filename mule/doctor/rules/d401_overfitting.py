"""Validation rises while training falls.

What it sees: the event that training logs when two evaluations in a row lie above the best one by more
than 0.5% while the training loss fell; here it is weighed. A rise by 2% of the best loss, and by twice
as much as validation had ever risen on its way down, is a warning, less a note: the last evaluations of
a good run wander too.
Why it matters: what the model learns from then on is its rows, not their subject. The best checkpoint
is kept, but the updates after it cost time for nothing, and the last weights are worse.
What to do: end such a run by itself with evaluate.patience=2; take fewer epochs, more rows, or dropout;
the weights to use are those that best.json names.
Source: Prechelt 1998, Early Stopping - But When?; mule/train/stopping.py holds the one definition.
"""

from __future__ import annotations

import itertools

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_LEAST_RISE, _TIMES_BEFORE = 0.02, 2.0  # of the best loss; of the largest rise before it


def _check(history: History) -> Found | None:
    told = [event for event in history.events if event["kind"] == "overfitting"]
    valid = history.series("val_loss")
    if not told or not len(valid):
        return None
    best, now = min(valid.values), valid.values[-1]
    if now <= best:
        return None
    place = valid.values.index(best)
    down = itertools.pairwise(valid.values[: place + 1])
    before = max((later - earlier for earlier, later in down), default=0.0)
    rise = now - best
    is_grave = rise >= _LEAST_RISE * best and rise >= _TIMES_BEFORE * before
    epochs = history.series("epoch").values
    return Found(
        "warning" if is_grave else "note",
        told[0]["step"],
        Message(
            "the validation loss rose from {:.4f} (update {}) to {:.4f}, "
            "by {:.1%}, while the training loss fell",
            best,
            valid.steps[place],
            now,
            rise / best,
        ),
        _remedy(history, valid.steps[place]),
        {"best": best, "best_step": valid.steps[place], "val_loss": now, "epochs": epochs[-1:]},
    )


def _remedy(history: History, best_step: int) -> str:
    adapter = history.kind == "adapter"
    dropout = "adapter.lora.dropout" if adapter else "train.dropout"
    if history.recipe.evaluate.patience is None:
        return Message(
            "evaluate.patience=2 train.steps={}; or {}=0.1 and more rows", best_step, dropout
        )
    return Message("train.steps={}; or {}=0.1 and more rows", best_step, dropout)


RULE = Rule("D401", "overfitting", _check, needs=("loss", "val_loss"))
