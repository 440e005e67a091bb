"""Every update is clipped.

What it sees: of the later half of the updates after the warm-up, at least 95% have a gradient norm
above optim.max_grad_norm. When the median norm is more than ten times the limit it is a warning,
else a note: small models and small batches often train well with norms of 2 to 5 against a limit of
1.
Why it matters: with a limit that is always reached every batch counts the same, a noisy one as much
as a sound one, and nothing is left of what clipping is for, to hold back the rare outlier.
What to do: set optim.max_grad_norm to the 90th percentile of the norms, given below; or take more
rows an update, which lowers the norm.
Source: Pascanu, Mikolov and Bengio 2013 (arXiv 1211.5063), section 3.2: a threshold from the
average norm over many updates.
"""

from __future__ import annotations

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import after_warmup
from mule.message import Message

_FEWEST_UPDATES = 24
_ALWAYS, _FAR_ABOVE = 0.95, 10.0


def _check(history: History) -> Found | None:
    norms, limit = after_warmup(history, "grad_norm"), history.recipe.optim.max_grad_norm
    if len(norms) < _FEWEST_UPDATES:
        return None
    later = signals.parts(norms, 2)[1]
    share = sum(value > limit for value in later.values) / len(later)
    if share < _ALWAYS:
        return None
    middle = signals.median(later.values)
    wanted = signals.quantile(later.values, 0.9)
    return Found(
        "warning" if middle > _FAR_ABOVE * limit else "note",
        next(s for s, v in zip(norms.steps, norms.values) if v > limit),
        Message(
            "{:.0%} of the later updates were clipped: the median norm is {:.3g}, "
            "{:.3g} times optim.max_grad_norm = {:g}",
            share,
            middle,
            middle / limit,
            limit,
        ),
        f"optim.max_grad_norm={wanted:.2g}",
        {"share_clipped": share, "grad_norm": middle, "max_grad_norm": limit},
    )


RULE = Rule("D203", "clipped at every update", _check, needs=("grad_norm",))
