"""An adapter with no effect.

What it sees: after a third of the run the adapter has changed the weights it sits beside by less than a
ten-thousandth of their size (|scale B A| / |W|, logged at every evaluation), and the loss, on validation
rows where there are some, has not fallen by 0.5%.
Why it matters: what is merged or served then is the base. It looks like a fine-tune that "did not help".
What to do: raise optim.learning_rate (1e-4 to 1e-3 is usual for LoRA), check adapter.lora.alpha / r (the
scale), and that adapter.lora.target_modules names layers that matter.
Source: Hu et al. 2021 (arXiv 2106.09685): B begins at zero, so that an untrained adapter is the base;
Biderman et al. 2024 (arXiv 2405.09673) on learning rates for LoRA.
"""

from __future__ import annotations

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import recent, start
from mule.message import Message

_NOTHING = 1e-4
_FALL = 0.005
_SHARE_OF_RUN = 0.3
_USUAL = 2e-4


def _check(history: History) -> Found | None:
    change = history.series("adapter_change")
    if change.steps[-1] < _SHARE_OF_RUN * history.num_steps or change.values[-1] >= _NOTHING:
        return None
    valid, loss = history.series("val_loss"), history.series("loss")
    if len(valid) >= 2:
        before, now = valid.values[0], valid.values[-1]
    else:
        before, now = (signals.median(part.values) for part in (start(loss), recent(loss)))
    if now < (1 - _FALL) * before:
        return None
    rate = float(history.recipe.optim.learning_rate)
    return Found(
        "warning",
        change.steps[0],
        Message(
            "the adapter changes the weights by {:.1e} of their size, and the loss is "
            "what it was ({:.4f}, now {:.4f}): what it makes is the base",
            change.values[-1],
            before,
            now,
        ),
        f"optim.learning_rate={max(_USUAL, 10 * rate):.2g}",
        {"change": change.values[-1], "before": before, "now": now, "learning_rate": rate},
    )


RULE = Rule("D801", "adapter with no effect", _check, ("adapter",), ("loss", "adapter_change"))
