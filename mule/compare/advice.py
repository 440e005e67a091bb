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
from mule.message import Message, joined

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
        parts.append(
            Message("Nearest published: {} ({}).", near[0].title, why_near(yours, near[0]))
        )
    for word, text in (
        ("ahead", Message("Ahead in")),
        ("behind", Message("Behind in")),
        ("unusual", Message("Unusual:")),
    ):
        labels = [BY_KEY[v.key].label for v in verdicts if v.word == word]
        if labels:
            parts.append(Message("{} {}.", text, joined(", ", labels)))
    if changes:
        parts.append(Message("Starting again: {}.", " ".join(edit.setting for edit in changes)))
    elif any(verdict.word in ("behind", "unusual") for verdict in verdicts):
        parts.append(
            Message("Change nothing: none of that is known to be better with another setting.")
        )
    else:
        parts.append(Message("Change nothing."))
    return joined(" ", parts)


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
        told = Message("{:g} to {:g}", min(usual), most) if min(usual) < most else f"{most:g}"
        return Edit(
            f"train.epochs={most:g}",
            Message(
                "{:.3g} passes over the same examples; published of about as many: {}", epochs, told
            ),
            Message("{:.0%} of the updates{}", saved, _of_time(yours, saved)),
            Message(
                "what later passes still give: evaluate.patience=3 instead stops when validation says so"
            ),
        )
    middle = float(round(median(usual)))
    factor = middle / epochs
    costs = Message("{:.3g} times the updates{}", factor, _as_time(yours, factor))
    return Edit(f"train.epochs={middle:g}", verdict.reason, Message("nothing"), costs)


def _more(verdict: Verdict | None, usual: Sequence[float]) -> Edit | None:
    """Whole passes in place of a few updates, where the examples were not counted."""
    if verdict is None or verdict.word != "behind":
        return None
    costs = Message("the updates that all examples take; `mule plan` counts them")
    return Edit(f"train.epochs={round(median(usual))}", verdict.reason, Message("nothing"), costs)


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
        wanted, why = _LORA_RATE, Message("adapters of every size are published with 1e-4 to 3e-4")
    elif (found := _published_rate(yours, peers)) is not None:
        wanted, why = found
    else:
        return None
    if not (own * 1.5 < wanted or wanted * 1.5 < own):
        return None
    if wanted > own:
        saves = Message("most of the updates, each of which goes {:.3g} times as far", wanted / own)
        costs = Message(
            "more of what the base knew, the further it goes: compare validation losses"
        )
        if yours.kind == "pretrain":
            costs = Message("a run that diverges, should it be too much: watch the gradient norm")
        why += _how_slow(yours)
    else:
        saves, costs = (
            Message("what the base knows"),
            Message("{:.3g} times shorter updates", own / wanted),
        )
    return Edit(f"optim.learning_rate={rate(wanted)}", why, saves, costs)


def _how_slow(yours: Setup) -> str:
    """What so small steps came to, where that is known."""
    steps, ratio = yours.number("steps"), yours.number("rate_ratio")
    first, last = yours.number("initial_loss"), yours.number("final_loss")
    told = Message("; now {:.3g} times below", ratio) if ratio else ""
    if steps and first and last and last > 4:
        told += Message(
            ", and {:,.0f} updates of it bring the loss from {:.3g} to {:.3g}", steps, first, last
        )
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
                return before / ratio, Message(
                    "{:.3g} times below pretraining, as {}", ratio, peer.title
                )
    own = yours.number("learning_rate") or 0.0
    like = [
        p for p in known if 1 / _LIKE_SIZE <= (p.number("parameters") or 0) / size <= _LIKE_SIZE
    ]
    rates = [value for peer in like if (value := peer.number("learning_rate"))]
    if not rates:
        return None
    middle = median(rates)
    told = Message("the median of {} published of about this size ({})", len(rates), rate(middle))
    if own > middle:
        return middle, told
    if own < middle / _FAR:
        return middle / 10, Message(
            "a tenth of {}: a third of your pretraining rate may be more", told
        )
    return None  # what is usual for the base's own pretraining decides


def _precision(words: Mapping[str, Verdict]) -> Edit | None:
    verdict = words.get("precision")
    if verdict is None or verdict.word != "behind":
        return None
    needs = Message("a GPU of 2020 or later, or a processor, that computes bf16")
    return Edit(
        "train.precision=bf16", verdict.reason, Message("skipped updates and the loss scale"), needs
    )


def _clipping(words: Mapping[str, Verdict]) -> Edit | None:
    verdict = words.get("max_grad_norm")
    if verdict is None or verdict.word != "unusual":
        return None
    return Edit(
        "optim.max_grad_norm=1.0",
        verdict.reason,
        Message("a run from one bad batch"),
        Message("nothing"),
    )


def _decay(words: Mapping[str, Verdict], peers: Sequence[Setup]) -> Edit | None:
    verdict = words.get("weight_decay")
    if verdict is None or verdict.word != "unusual":
        return None
    most = max((p.number("weight_decay") or 0.0 for p in peers), default=0.1)
    return Edit(
        f"optim.weight_decay={most:g}", verdict.reason, Message("nothing"), Message("nothing")
    )


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
        Message("nothing; a smaller model.size for the same tokens is the other way"),
        Message("{:.3g} times the updates{}", wanted / trained, _as_time(yours, wanted / trained)),
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
    why = Message("{:,.0f} updates would be {:.0%} of {:,.0f}", warmup, warmup / steps, steps)
    return Edit(
        f"optim.warmup_steps={wanted}",
        why,
        Message("updates at a rate below the one chosen"),
        Message("nothing"),
    )


def _of_time(yours: Setup, share: float) -> str:
    time = yours.number("hours")
    return Message(", {} of {}", hours(time * share), hours(time)) if time else ""


def _as_time(yours: Setup, factor: float) -> str:
    time = yours.number("hours")
    return Message(", {} instead of {}", hours(time * factor), hours(time)) if time else ""
