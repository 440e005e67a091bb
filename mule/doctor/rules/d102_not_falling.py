"""The training loss does not fall.

What it sees: (a) a loss whose level now is, within its noise, that of the first updates: even the
most favourable reading (2 standard errors) is a fall of less than 5% in pretraining, 3% in
fine-tuning. Validation must say the same where it was measured: its rows are fixed, so it shows
smaller falls. (b) Outside of adapters, less than 1% of the weights being trained.
Why it matters: nothing is being learned. The rate is far too low, what should learn is frozen, the
gradient does not arrive, or the data has nothing that the model does not know already.
What to do: raise optim.learning_rate threefold; look for weights held by train.freeze; read some
rows with `mule data preview`; where the model knows the data already, other data is the remedy.
Source: an equivalence test (Schuirmann 1987, two one-sided tests) instead of a flat-looking curve,
so that noise alone is never called a plateau.
"""

from __future__ import annotations

import math

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History, Series
from mule.doctor.phases import higher_rate, recent, start, warmup_steps
from mule.message import Message

_LEAST_FALL = {"pretrain": 0.05, "fine-tune": 0.03, "adapter": 0.03}  # share of the first loss
_LEAST_VALIDATED, _LEAST_TRAINED = 0.01, 0.01
_FEWEST_UPDATES = 24


def _check(history: History) -> Found | None:
    if held := _hardly_trained(history):
        return held
    loss = history.series("loss")
    if len(loss) < _FEWEST_UPDATES + warmup_steps(history):
        return None
    first, now = start(loss), recent(loss, 0.25)
    before, after = signals.median(first.values), signals.median(now.values)
    error = 1.25 * signals.noise(loss.values) * math.sqrt(1 / len(first) + 1 / len(now))
    most = before - after + 2 * error  # the fall, read as favourably as noise allows
    most = max(most, _fall_at_once(loss, after, len(now)))
    if most >= _LEAST_FALL[history.kind] * before or _validation_fell(history.series("val_loss")):
        return None
    return Found(
        "warning",
        warmup_steps(history) + 1,
        Message(
            "the loss has not fallen: {:.4f} at the start, {:.4f} in the last {} updates (±{:.4f})",
            before,
            after,
            len(now),
            2 * error,
        ),
        higher_rate(history, 3),
        {"first_loss": before, "loss": after, "error": error},
    )


def _fall_at_once(loss: Series, after: float, count: int) -> float:
    """The fall since the very first updates, where it is surely one; else 0."""
    error = 1.25 * signals.noise(loss.values) * math.sqrt(1 / 3 + 1 / count)
    fall = signals.median(loss.values[:3]) - after
    return fall if fall > 2.5 * error else 0.0


def _hardly_trained(history: History) -> Found | None:
    """Weights that are held, which the curve may hide: norms alone can lower a loss a little."""
    trained = history.facts.get("trained")
    if not trained or history.kind == "adapter":
        return None
    share = trained["num_trained"] / trained["num_weights"]
    if share >= _LEAST_TRAINED:
        return None
    held = ", ".join(history.recipe.train.freeze)
    return Found(
        "warning",
        1,
        Message("{:.2%} of the weights are trained: train.freeze holds the rest ({})", share, held),
        "train.freeze=[]",
        dict(trained),
    )


def _validation_fell(valid: Series) -> bool:
    if len(valid) < 2:
        return False
    return valid.values[0] - min(valid.values) > _LEAST_VALIDATED * valid.values[0]


RULE = Rule("D102", "loss not falling", _check)
