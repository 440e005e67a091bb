"""The gradient norm vanishes.

What it sees: while there is still a loss to lower (more than 0.1, and a tenth of what it was), the
median norm of the last updates is zero or below 1e-5, where AdamW's optim.eps begins to swallow the
updates; or it is a hundredth of what it was in the first quarter of the run.
Why it matters: what should learn gets no signal: a graph that is cut, weights that are held, an
adapter on modules that are never used, numbers that underflow. The loss stays where it is.
What to do: look at train.freeze and adapter.lora.target_modules; in fp16 take train.precision=bf16
or fp32.
Source: unslothai/unsloth issue 1282 (gradient norm is zero); Kingma and Ba 2015 (arXiv 1412.6980),
section 2, on the size of AdamW's updates and eps.
"""

from __future__ import annotations

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import recent, start
from mule.message import Message

_FEWEST_UPDATES = 10
_SWALLOWED, _SHRUNK = 1e-5, 0.01
_LOSS_LEFT, _SHARE_LEFT = 0.1, 0.1


def _check(history: History) -> Found | None:
    norms, loss = history.series("grad_norm"), history.series("loss")
    if len(norms) < _FEWEST_UPDATES:
        return None
    left, first_loss = signals.median(recent(loss).values), signals.median(start(loss).values)
    if left < max(_LOSS_LEFT, _SHARE_LEFT * first_loss):
        return None
    now = signals.median(recent(norms).values)
    before = signals.median(signals.parts(norms, 4)[0].values)
    limit = max(_SWALLOWED, _SHRUNK * before)
    if now >= limit:
        return None
    last_sound = max((s for s, v in zip(norms.steps, norms.values) if v >= limit), default=0)
    freeze = history.recipe.train.freeze
    held = (
        Message("train.freeze=[] (it holds {})", ", ".join(freeze))
        if freeze
        else "train.precision=fp32"
    )
    adapter = "adapter.lora.target_modules=all-linear" if history.kind == "adapter" else held
    return Found(
        "alarm",
        min(last_sound + 1, history.step),
        Message(
            "the gradient norm is {:.2g} at a loss of {:.3f}: nothing reaches the weights",
            now,
            left,
        )
        + (Message(" (it was {:.2g})", before) if before > limit else ""),
        adapter,
        {"grad_norm": now, "first_grad_norm": before, "loss": left},
    )


RULE = Rule("D202", "gradient norm vanishing", _check, needs=("loss", "grad_norm"))
