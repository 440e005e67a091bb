"""A plateau while the learning rate is still high.

What it sees: (a) a loss that stopped falling within the first third of the updates, at more than
half the peak rate and less than 30% below where it began, and whose averages over a sixth of the
run have been alike since, within 1% (or 3 standard errors), asked when 60% of the run are over: in
pretraining, and in fine-tuning where it stands above the loss that the base had on such text
before: a warning; (b) strong dropout (0.3 and more) in a model that does no better on its training
rows than on held-out ones (within 5%): a warning; (c) over the last third of the updates a loss
that moved by less than 0.5% though the rate was above half its peak: a note, for so do healthy runs
at a constant rate look before their decay. At the end of a decaying schedule a plateau is what it
should be.
Why it matters: these updates teach hardly anything. A model that stops so early has learned how
often tokens occur and no more: what follows does not follow from what went before, or the model is
held back.
What to do: read some rows with `mule data preview`; lower dropout; let the rate fall
(optim.schedule=cosine or wsd); one more epoch at 10 to 20% lower peak rate; else a larger model or
more data, since this one has given what it can.
Source: Hu et al. 2024 (MiniCPM, arXiv 2404.06395), section 4: the loss falls in the decay; Hägele
et al. 2024 (arXiv 2405.18392); Srivastava et al. 2014 (JMLR 15), section A.4, on dropout and the
rate.
"""

from __future__ import annotations

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import after_warmup, block_error, peak_rate, rate_at, recent, start
from mule.message import Message

_FEWEST_UPDATES, _FEWEST_VALIDATIONS = 60, 3
_FEWEST_TO_BE_STUCK, _MOST_OF_IT = 100, 0.6  # models may pause for a while, and learn on
_BAND, _BAND_ERRORS, _LITTLE = 0.01, 3.0, 0.3
_MOVED, _HIGH_RATE, _LESS = 0.005, 0.5, 0.85
_STRONG_DROPOUT, _AS_HIGH = 0.3, 0.95


def _check(history: History) -> Found | None:
    if len(history.series("loss")) < _FEWEST_UPDATES:
        return None
    return _held_back(history) or _stuck(history) or _flat_at_high_rate(history)


def _stuck(history: History) -> Found | None:
    """A loss that stopped falling early, at the full rate, a little below where it began."""
    if history.step < max(_FEWEST_TO_BE_STUCK, _MOST_OF_IT * history.num_steps):
        return None
    loss = after_warmup(history)
    sixths = signals.parts(loss, 6)
    levels = [signals.median(part.values) for part in sixths]
    level = signals.median(levels[2:])
    first = signals.median(history.series("loss").values[:3])
    band = max(_BAND_ERRORS * block_error(loss, 6), _BAND * level)
    flat = all(abs(value - level) <= band for value in levels[2:])
    if not flat or band > 2 * _BAND * level or not 2 * band < first - level < _LITTLE * first:
        return None
    plain = (history.facts.get("base") or {}).get("plain_loss")
    if history.kind != "pretrain" and (plain is None or level <= plain):
        return None  # a base that learned all it could at once is healthy
    begun = sixths[1 if abs(levels[1] - level) <= band else 2].steps[0]
    if rate_at(history, begun) < _HIGH_RATE:
        return None
    return Found(
        "warning",
        begun,
        Message(
            "the loss has stood at {:.3f} (±{:.3f}) since update {}, at the full learning "
            "rate; it had begun at {:.3f}",
            level,
            band,
            begun,
            first,
        ),
        Message("mule data preview RECIPE, to see what is learned"),
        {"loss": level, "band": band, "first_loss": first},
    )


def _held_back(history: History) -> Found | None:
    """Strong dropout in a model that has not begun to learn its rows by heart."""
    adapter = history.kind == "adapter"
    recipe = history.recipe
    name = "adapter.lora.dropout" if adapter else "train.dropout"
    dropout = recipe.adapter.lora.dropout if adapter else recipe.train.dropout
    valid = history.series("val_loss")
    if dropout < _STRONG_DROPOUT or not len(valid):
        return None
    now = signals.median(recent(history.series("loss")).values)
    if now < _AS_HIGH * valid.values[-1]:
        return None  # it learns its rows better than others: that is what dropout is for
    return Found(
        "warning",
        valid.steps[0],
        Message(
            "a dropout of {:g} holds the model back: it does not do better on its own rows "
            "({:.3f}) than on others ({:.3f})",
            dropout,
            now,
            valid.values[-1],
        ),
        f"{name}=0",
        {"dropout": dropout, "loss": now, "val_loss": valid.values[-1]},
    )


def _flat_at_high_rate(history: History) -> Found | None:
    """The last third, where the rate has not fallen yet."""
    loss = history.series("loss")
    last = recent(loss, 1 / 3)
    begun = last.steps[0]
    if min(rate_at(history, begun), rate_at(history, history.step)) < _HIGH_RATE:
        return None
    now, first = signals.median(last.values), signals.median(start(loss).values)
    valid = signals.between(history.series("val_loss"), begun, history.step)
    if len(valid) >= _FEWEST_VALIDATIONS:
        moved, level = max(valid.values) - min(valid.values), valid.values[-1]
    else:
        line = signals.trend(last)
        moved = abs(line.last - line.first) + 2 * line.error * (last.steps[-1] - begun)
        level = now
    if moved >= _MOVED * level or first - now < 4 * _MOVED * first:
        return None
    lower = f"optim.learning_rate={_LESS * peak_rate(history):.2g}"
    constant = history.recipe.optim.schedule == "constant"
    return Found(
        "note",
        begun,
        Message(
            "the loss moved by {:.4f} since update {} ({:.3f} now) at a learning rate above "
            "half its peak",
            moved,
            begun,
            now,
        ),
        f"optim.schedule=wsd {lower}" if constant else Message("{}, for one more epoch", lower),
        {"moved": moved, "loss": now},
    )


RULE = Rule("D106", "plateau", _check, needs=("loss", "learning_rate"))
