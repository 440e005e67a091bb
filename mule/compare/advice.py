"""What to change if starting again, with the exact settings, and the closing words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mule.compare.nearest import nearest, references, related_kinds, why_near
from mule.compare.parameters import BY_KEY, hours, rate
from mule.compare.sourced import Setup
from mule.compare.verdict import Verdict

_LIKE, _LIKE_SIZE = 10.0, 4.0  # times the examples or the parameters, or as few
_FAR = 30.0  # times below the published: so low that no pretraining rate explains it
_WARMUP = 0.03  # share of the updates, as most of the published
_LORA_RATE = 2e-4
_TOKENS_A_PARAMETER = 20


@dataclass(frozen=True)
class Edit:
    """A `key=value` for the command line or the recipe: why, what it saves, what it costs."""

    setting: str
    why: str
    saves: str
    costs: str


def edits(yours: Setup, verdicts: Sequence[Verdict], setups: Mapping[str, Setup]) -> list[Edit]:
    """The changes that the verdicts call for, the one that weighs most first."""
    words = {verdict.key: verdict for verdict in verdicts}
    peers = references(yours, setups.values())
    found = [
        _length(yours, words, setups),
        _rate(yours, words, peers),
        _precision(words),
        _clipping(words),
        _decay(words, peers),
        _tokens(yours, words),
    ]
    changes = [edit for edit in found if edit is not None]
    if warmup := _warmup(yours, words, changes):
        changes.append(warmup)
    return changes


def closing(
    yours: Setup, verdicts: Sequence[Verdict], changes: Sequence[Edit], setups: Mapping[str, Setup]
) -> str:
    """The comparison in words: nearest, ahead, behind, and what to do."""
    parts = []
    if near := nearest(yours, setups.values(), 1):
        parts.append(f"Nearest published: {near[0].title} ({why_near(yours, near[0])}).")
    for word, text in (("ahead", "Ahead in"), ("behind", "Behind in"), ("unusual", "Unusual:")):
        labels = [BY_KEY[v.key].label for v in verdicts if v.word == word]
        if labels:
            parts.append(f"{text} {', '.join(labels)}.")
    if changes:
        parts.append(f"Starting again: {' '.join(edit.setting for edit in changes)}.")
    elif any(verdict.word in ("behind", "unusual") for verdict in verdicts):
        parts.append("Change nothing: none of that is known to be better with another setting.")
    else:
        parts.append("Change nothing.")
    return " ".join(parts)


# ---------------------------------------------------------------- one function an edit


def _length(yours: Setup, words: Mapping[str, Verdict], setups: Mapping[str, Setup]) -> Edit | None:
    """Fewer passes, or more."""
    verdict, epochs = words.get("epochs"), yours.number("epochs")
    usual = _published_epochs(yours, setups)
    if epochs is None:
        return _more(words.get("steps"), usual)
    if verdict is None or verdict.word == "near":
        return None
    if verdict.word == "unusual":
        most, saved = max(usual), 1 - max(usual) / epochs
        told = f"{min(usual):g} to {most:g}" if min(usual) < most else f"{most:g}"
        return Edit(
            f"train.epochs={most:g}",
            f"{epochs:.3g} passes over the same examples; published of about as many: {told}",
            f"{saved:.0%} of the updates{_of_time(yours, saved)}",
            "what later passes still give: evaluate.patience=3 instead stops when validation says so",
        )
    middle = float(round(median(usual)))
    factor = middle / epochs
    costs = f"{factor:.3g} times the updates{_as_time(yours, factor)}"
    return Edit(f"train.epochs={middle:g}", verdict.reason, "nothing", costs)


def _more(verdict: Verdict | None, usual: Sequence[float]) -> Edit | None:
    """Whole passes in place of a few updates, where the examples were not counted."""
    if verdict is None or verdict.word != "behind":
        return None
    costs = "the updates that all examples take; `mule plan` counts them"
    return Edit(f"train.epochs={round(median(usual))}", verdict.reason, "nothing", costs)


def _published_epochs(yours: Setup, setups: Mapping[str, Setup]) -> list[float]:
    """Of the published with about as many examples; 2 where there are none."""
    own = yours.number("rows")
    related = references(yours, setups.values(), kinds=related_kinds(yours))
    found = []
    for setup in related:
        epochs, rows = setup.number("epochs"), setup.number("rows")
        if epochs and (not own or (rows and own / _LIKE <= rows <= own * _LIKE)):
            found.append(epochs)
    return found or [2.0]


def _rate(yours: Setup, words: Mapping[str, Verdict], peers: Sequence[Setup]) -> Edit | None:
    """As far below pretraining as the published of this size, or what adapters take."""
    verdict, own = words.get("learning_rate"), yours.number("learning_rate")
    ratio = words.get("rate_ratio")
    is_odd = "unusual" in (verdict.word if verdict else "", ratio.word if ratio else "")
    if own is None or not is_odd:
        return None
    if yours.kind == "adapter":
        wanted, why = _LORA_RATE, "adapters of every size are published with 1e-4 to 3e-4"
    elif (found := _published_rate(yours, peers)) is not None:
        wanted, why = found
    else:
        return None
    if not (own * 1.5 < wanted or wanted * 1.5 < own):
        return None
    if wanted > own:
        saves = f"most of the updates, each of which goes {wanted / own:.3g} times as far"
        costs = "more of what the base knew, the further it goes: compare validation losses"
        if yours.kind == "pretrain":
            costs = "a run that diverges, should it be too much: watch the gradient norm"
        why += _how_slow(yours)
    else:
        saves, costs = "what the base knows", f"{own / wanted:.3g} times shorter updates"
    return Edit(f"optim.learning_rate={rate(wanted)}", why, saves, costs)


def _how_slow(yours: Setup) -> str:
    """What so small steps came to, where that is known."""
    steps, ratio = yours.number("steps"), yours.number("rate_ratio")
    first, last = yours.number("initial_loss"), yours.number("final_loss")
    told = f"; now {ratio:.3g} times below" if ratio else ""
    if steps and first and last and last > 4:
        told += f", and {steps:,.0f} updates of it bring the loss from {first:.3g} to {last:.3g}"
    return told


def _published_rate(yours: Setup, peers: Sequence[Setup]) -> tuple[float, str] | None:
    """By the ratio to pretraining of the nearest in size that has one, else by its rate."""
    size, before = yours.number("parameters"), yours.number("pretraining_rate")
    known = [p for p in peers if p.number("parameters") and p.get("optimizer") != "muon"]
    if not size or not known:
        return None
    by_size = sorted(known, key=lambda p: abs(math.log((p.number("parameters") or size) / size)))
    if before:
        for peer in by_size:
            if ratio := peer.number("rate_ratio"):
                return before / ratio, f"{ratio:.3g} times below pretraining, as {peer.title}"
    own = yours.number("learning_rate") or 0.0
    like = [
        p for p in known if 1 / _LIKE_SIZE <= (p.number("parameters") or 0) / size <= _LIKE_SIZE
    ]
    rates = [value for peer in like if (value := peer.number("learning_rate"))]
    if not rates:
        return None
    middle = median(rates)
    told = f"the median of {len(rates)} published of about this size ({rate(middle)})"
    if own > middle:
        return middle, told
    if own < middle / _FAR:
        return middle / 10, f"a tenth of {told}: a third of your pretraining rate may be more"
    return None  # what is usual for the base's own pretraining decides


def _precision(words: Mapping[str, Verdict]) -> Edit | None:
    verdict = words.get("precision")
    if verdict is None or verdict.word != "behind":
        return None
    needs = "a GPU of 2020 or later, or a processor, that computes bf16"
    return Edit("train.precision=bf16", verdict.reason, "skipped updates and the loss scale", needs)


def _clipping(words: Mapping[str, Verdict]) -> Edit | None:
    verdict = words.get("max_grad_norm")
    if verdict is None or verdict.word != "unusual":
        return None
    return Edit("optim.max_grad_norm=1.0", verdict.reason, "a run from one bad batch", "nothing")


def _decay(words: Mapping[str, Verdict], peers: Sequence[Setup]) -> Edit | None:
    verdict = words.get("weight_decay")
    if verdict is None or verdict.word != "unusual":
        return None
    most = max((p.number("weight_decay") or 0.0 for p in peers), default=0.1)
    return Edit(f"optim.weight_decay={most:g}", verdict.reason, "nothing", "nothing")


def _tokens(yours: Setup, words: Mapping[str, Verdict]) -> Edit | None:
    """Of a new model: as many tokens as its size is worth."""
    verdict, size = words.get("tokens_per_parameter"), yours.number("parameters")
    trained = yours.number("trained_tokens")
    if verdict is None or verdict.word != "behind" or not size or not trained:
        return None
    wanted = _TOKENS_A_PARAMETER * size
    return Edit(
        f"train.tokens={wanted:.0f}",
        verdict.reason,
        "nothing; a smaller model.size for the same tokens is the other way",
        f"{wanted / trained:.3g} times the updates{_as_time(yours, wanted / trained)}",
    )


def _warmup(yours: Setup, words: Mapping[str, Verdict], changes: Sequence[Edit]) -> Edit | None:
    """A warm-up for the new length, where one is set."""
    warmup, steps = yours.number("warmup_steps"), yours.number("steps")
    if not warmup or not steps:
        return None
    epochs = next((e.setting for e in changes if e.setting.startswith("train.epochs=")), None)
    if epochs and (now := yours.number("epochs")):
        steps *= float(epochs.partition("=")[2]) / now
    verdict = words.get("warmup_share")
    if not (verdict and verdict.word == "unusual") and warmup / steps <= 0.2:
        return None
    wanted = max(1, round(_WARMUP * steps))
    why = f"{warmup:,.0f} updates would be {warmup / steps:.0%} of {steps:,.0f}"
    return Edit(
        f"optim.warmup_steps={wanted}", why, "updates at a rate below the one chosen", "nothing"
    )


def _of_time(yours: Setup, share: float) -> str:
    time = yours.number("hours")
    return f", {hours(time * share)} of {hours(time)}" if time else ""


def _as_time(yours: Setup, factor: float) -> str:
    time = yours.number("hours")
    return f", {hours(time * factor)} instead of {hours(time)}" if time else ""
