"""How the tokens are spread over the experts of each block, for the rules about mixtures."""

from __future__ import annotations

from dataclasses import dataclass

from mule.doctor.history import History
from mule.doctor.phases import warmup_steps
from mule.message import Message

_FEWEST_REPORTS, _LATER = 3, 3  # the last third of the reports
_FEWEST_TOKENS = 200  # for each expert, if all had their share
_SETTLING_STEPS = 30  # after the warm-up, in which routers find their experts
_USUAL_PER_TOKEN = 2
_AUX_LOSS, _BIAS_RATE = 0.01, 0.001  # where the recipe leaves them open


@dataclass(frozen=True)
class Load:
    """Of each block by its number, what each expert gets of its fair share: 1 is fair.

    `most` is what one could get: E / k. `step` is where the counting began.
    """

    shares: dict[int, list[float]]
    most: float
    step: int
    num_reports: int


def load(history: History) -> Load | None:
    """Over the later third of the reports since the routers settled; None of too few to tell."""
    settled = warmup_steps(history) + _SETTLING_STEPS
    reports = [(step, moe) for step, moe in history.pick("moe") if moe and step >= settled]
    count = max(_FEWEST_REPORTS, len(reports) // _LATER)
    if len(reports) < _FEWEST_REPORTS:
        return None
    chosen = [moe for _, moe in reports[-count:]]
    layers: list[int] = chosen[-1]["layers"]
    totals: dict[int, list[int]] = {}
    for report in chosen:
        if report["layers"] != layers:
            continue
        for layer, counts in zip(layers, report["tokens_per_expert"]):
            before = totals.get(layer, [0] * len(counts))
            totals[layer] = [a + b for a, b in zip(before, counts)]
    fair = {layer: sum(counts) / len(counts) for layer, counts in totals.items()}
    if not fair or min(fair.values()) < _FEWEST_TOKENS:
        return None
    shares = {layer: [n / fair[layer] for n in counts] for layer, counts in totals.items()}
    num = len(next(iter(shares.values())))
    known = history.facts.get("experts", {}).get("per_token")
    per_token = known or history.recipe.model.moe.experts_per_token or min(_USUAL_PER_TOKEN, num)
    return Load(shares, num / per_token, reports[-count][0], len(chosen))


def remedy(history: History) -> str:
    """The setting that spreads the tokens, given the one in use."""
    if history.kind == "adapter":
        return Message(
            "its router is frozen: choose another base, or train all weights: adapter.kind=none"
        )
    moe = history.recipe.model.moe
    if moe.balance == "bias":
        return f"model.moe.bias_rate={10 * (moe.bias_rate or _BIAS_RATE):g}"
    if moe.balance == "none":
        return "model.moe.balance=bias"
    return Message(
        "model.moe.aux_loss={:g}; or model.moe.balance=bias", 10 * (moe.aux_loss or _AUX_LOSS)
    )
