"""The batch is too noisy.

What it sees: after the warm-up the loss differs from update to update (standard deviation) by more
than 0.2 nats in pretraining, or by more than 40% of its level in fine-tuning, where answers differ
more than running text does; and an update has fewer than 1,000 trained tokens (500 in pretraining).
From two thirds of that on it is a note.
Why it matters: a token's loss varies by 2 to 3 nats, so that 0.2 is the mean of about 150 of them.
The direction of such an update is mostly chance. The loss settles higher than it could, and neither
the curve nor a rule can see small changes in it.
What to do: take more rows an update: train.step_rows as below, with the learning rate raised by the
square root of the same factor; or let the rate fall to nothing at the end.
Source: McCandlish et al. 2018 (arXiv 1812.06162) on the noise scale of gradients; Malladi et al.
2022 (arXiv 2205.10287) on the square root for Adam.
"""

from __future__ import annotations

import math

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History, Series
from mule.doctor.phases import after_warmup
from mule.message import Message

_FEWEST_UPDATES = 32
_NATS, _SHARE = 0.2, 0.4
_FEW_TARGETS = {"pretrain": 500, "fine-tune": 1000, "adapter": 1000}
_SOMEWHAT, _WANTED = 0.65, 0.5  # of the above
_LITTLE = 0.3  # of the first loss: below it a share says nothing


def _check(history: History) -> Found | None:
    loss = after_warmup(history)
    targets = signals.median(history.series("num_targets").values)
    if len(loss) < _FEWEST_UPDATES or targets >= _FEW_TARGETS[history.kind]:
        return None
    noise = signals.noise(loss.values)
    of_limit = noise / _NATS if history.kind == "pretrain" else _share_of_level(loss) / _SHARE
    if of_limit < _SOMEWHAT:
        return None
    factor = math.ceil((of_limit / _WANTED) ** 2)
    rows = history.recipe.train.step_rows
    return Found(
        "warning" if of_limit >= 1 else "note",
        loss.steps[0],
        Message(
            "the loss differs by {:.2f} nats from update to update, at a level of "
            "{:.2f}; an update has {:.0f} trained tokens",
            noise,
            signals.median(loss.values),
            targets,
        ),
        f"train.step_rows={rows * factor}"
        if rows
        else Message("{} times as many rows an update", factor),
        {"noise": noise, "targets": targets, "step_rows": rows},
    )


def _share_of_level(loss: Series) -> float:
    """The noise as a share of the level, in the middle of four parts; 0 of one learned by heart."""
    shares = []
    for part in signals.parts(loss, 4):
        level = signals.median(part.values)
        if level >= _LITTLE * loss.values[0]:
            shares.append(signals.noise(part.values) / level)
    return signals.median(shares) if shares else 0.0


RULE = Rule("D204", "batch too noisy", _check, needs=("loss", "num_targets"))
