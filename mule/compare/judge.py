"""A verdict on each parameter beside the published setups: the word, its reason, its sources.

Only like is held against like: rates against models of about the same size, epochs against about as
many examples. Where nothing is alike the verdict is "not comparable".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from mule.compare.nearest import references, related_kinds
from mule.compare.parameters import BY_KEY, PARAMETERS
from mule.compare.plausible import judged_loss
from mule.compare.sourced import Setup
from mule.compare.verdict import Verdict, Word
from mule.message import Message, joined

_WHOLE = 0.95  # epochs from which every example counts as seen
_LIKE_SIZE, _LIKE_ROWS, _LIKE_TOKENS = 4.0, 10.0, 100.0  # factors within which setups are alike


def judged(yours: Setup, setups: Mapping[str, Setup]) -> list[Verdict]:
    """A verdict for each parameter of yours that can have one, in the order of the table."""
    peers = _Peers(yours, list(setups.values()))
    found = []
    for parameter in PARAMETERS:
        judge = _JUDGES.get(parameter.key)
        if judge and parameter.key in yours.values and (verdict := judge(peers, parameter.key)):
            found.append(verdict)
    return found


class _Peers:
    """Yours and those it may be held against."""

    def __init__(self, yours: Setup, setups: Sequence[Setup]) -> None:
        self.yours = yours
        self.alike = references(yours, setups)  # the same kind of training
        self.related = references(yours, setups, kinds=related_kinds(yours))

    def within(self, refs: Sequence[Setup], key: str, factor: float) -> list[Setup]:
        """Those whose `key` is within a factor of yours; all of them where yours is not known."""
        own = self.yours.number(key)
        if not own:
            return list(refs)
        known = [(ref.number(key), ref) for ref in refs]
        return [r for n, r in known if n and abs(math.log(n / own)) <= math.log(factor)]


@dataclass(frozen=True)
class _Range:
    """How a value beyond the published ones is called, from a factor of `slack` on, and why."""

    below: Word
    above: Word
    slack: float = 1.0
    why_below: str = ""
    why_above: str = ""
    among: str = ""  # which of the published these are


def _against(peers: _Peers, key: str, refs: Sequence[Setup], rule: _Range) -> Verdict | None:
    """The value against the least and the most of `refs`."""
    own = peers.yours.number(key)
    known = sorted((r for r in refs if r.number(key) is not None), key=lambda r: r.number(key) or 0)
    if own is None or not known:
        return None
    low, high = known[0], known[-1]
    least, most = low.number(key) or 0.0, high.number(key) or 0.0
    among = Message(" {}", rule.among) if rule.among else ""
    ends = [low] if low is high else [low, high]
    if own < least / rule.slack:
        words = Message(
            "{}less than the least published{}, {}", _times(least, own), among, _told(low, key)
        )
        return Verdict.of(key, rule.below, _because(words, rule.why_below), [low])
    if own > most * rule.slack:
        words = Message(
            "{}more than the most published{}, {}", _times(own, most), among, _told(high, key)
        )
        return Verdict.of(key, rule.above, _because(words, rule.why_above), [high])
    between = joined(" to ", [_told(end, key) for end in ends])
    if least == most and len(known) > 1:
        between = Message("{} ({} and {} more)", low.shown(key), low.title, len(known) - 1)
    return Verdict.of(key, "near", Message("published{}: {}", among, between), ends)


def _times(large: float, small: float) -> str:
    return Message("{:.3g} times ", large / small) if small and large / small >= 1.05 else ""


def _because(words: str, why: str) -> str:
    return Message("{}: {}", words, why) if why else words


def _told(setup: Setup, key: str) -> str:
    return Message("{} ({})", setup.shown(key), setup.title)


# ---------------------------------------------------------------- one function a parameter


def _parameters(peers: _Peers, key: str) -> Verdict | None:
    if not peers.alike:
        return None
    own = peers.yours.number(key) or 1.0
    like = peers.within(peers.alike, key, _LIKE_SIZE)
    like.sort(key=lambda r: abs(math.log((r.number(key) or own) / own)))
    if like:
        names = joined(", ", [_told(setup, key) for setup in like[:3]])
        return Verdict.of(key, "near", Message("published of about this size: {}", names), like[:3])
    sizes = sorted(r.number(key) or 0 for r in peers.alike if r.number(key))
    span = Message("{} to {}", BY_KEY[key].show(sizes[0]), BY_KEY[key].show(sizes[-1]))
    return Verdict.of(
        key, "not comparable", Message("none published is within {:g} times: {}", _LIKE_SIZE, span)
    )


def _rows(peers: _Peers, key: str) -> Verdict | None:
    few = Message("few examples teach a manner of answering, hardly knowledge")
    return _against(peers, key, peers.related, _Range("behind", "ahead", 2.0, why_below=few))


def _learning_rate(peers: _Peers, key: str) -> Verdict | None:
    refs = [r for r in peers.alike if r.get("optimizer") != "muon"]
    if peers.yours.kind != "adapter":  # whose rates are alike from 7B to 70B
        like = peers.within(refs, "parameters", _LIKE_SIZE)
        if not like and peers.yours.number("parameters"):
            sizes = sorted(r.number("parameters") or 0 for r in refs)
            told = Message(
                "{} against {}",
                peers.yours.shown("parameters"),
                BY_KEY["parameters"].show(sizes[0]),
            )
            return Verdict.of(
                key, "not comparable", Message("rates fall as models grow: {} and more", told)
            )
        refs = like
    slow, fast = (
        Message("it learns slowly"),
        Message("it may undo what the model knows, or diverge"),
    )
    among = "" if peers.yours.kind == "adapter" else Message("of about this size")
    verdict = _against(peers, key, refs, _Range("unusual", "unusual", 3.0, slow, fast, among))
    if verdict is None or verdict.word == "near" or peers.yours.kind != "fine-tune":
        return verdict
    return _beside_its_pretraining(peers, verdict)


def _beside_its_pretraining(peers: _Peers, verdict: Verdict) -> Verdict:
    """An odd rate is usual where the base was pretrained at an odd one too."""
    ratio = _rate_ratio(peers, "rate_ratio")
    if ratio is None:
        unknown = Message(
            "; what counts is how far below its own pretraining it is, which is not known here"
        )
        return replace(verdict, reason=verdict.reason + unknown)
    if ratio.word == "unusual":
        return verdict
    usual = Message(
        "{} times below its own pretraining, as others are", peers.yours.shown("rate_ratio")
    )
    return replace(verdict, word="near", reason=Message("{}; {}", usual, verdict.reason))


def _rate_ratio(peers: _Peers, key: str) -> Verdict | None:
    """Times below the pretraining rate, against the median: this does not depend on the size."""
    own = peers.yours.number(key)
    refs = [r for r in peers.alike if r.number(key) and r.get("optimizer") != "muon"]
    if own is None or not refs:
        return None
    middle = median(r.number(key) or 0 for r in refs)
    extreme = max(refs, key=lambda r: r.number(key) or 0)
    shown = Message("half of the published are {:.3g} times below or less", middle)
    if own > 3 * middle:
        told = Message("{}; only {} is as far", shown, _told(extreme, key))
        if own > (extreme.number(key) or 0) * 1.05:
            told = Message("{}, and the furthest {}", shown, _told(extreme, key))
        return Verdict.of(key, "unusual", told, [extreme])
    least = min(refs, key=lambda r: r.number(key) or 0)
    if own < (least.number(key) or 0) / 2:
        return Verdict.of(
            key, "unusual", Message("closer to pretraining than {}", _told(least, key)), [least]
        )
    return Verdict.of(
        key, "near", Message("{}, the furthest {}", shown, _told(extreme, key)), [extreme]
    )


def _batch_rows(peers: _Peers, key: str) -> Verdict | None:
    if peers.yours.kind == "pretrain":
        return None  # counted in tokens
    own, rows = peers.yours.number(key), peers.yours.number("rows")
    known = [(r.number(key), r.number("rows")) for r in peers.related]
    fewest = min((count for _, count in known if count), default=math.inf)
    smallest = min((size for size, _ in known if size), default=0.0)
    if own and rows and own < smallest and rows < fewest * _LIKE_ROWS:
        words = Message("as fits {:,.0f} examples: {:,.0f} updates an epoch", rows, rows / own)
        return Verdict.of(key, "near", words)
    return _against(peers, key, peers.related, _Range("unusual", "unusual", 2.0))


def _batch_tokens(peers: _Peers, key: str) -> Verdict | None:
    if peers.yours.kind != "pretrain":
        return None
    like = peers.within(peers.alike, "trained_tokens", _LIKE_TOKENS)
    if not like:
        words = Message("updates grow with the tokens of the run, and none published is as short")
        return Verdict.of(key, "not comparable", words)
    return _against(peers, key, like, _Range("unusual", "unusual", 4.0))


def _warmup_share(peers: _Peers, key: str) -> Verdict | None:
    own = peers.yours.number(key)
    if own is not None and peers.yours.kind == "pretrain":
        long = own > 0.1
        words = Message(
            "{} updates; published: 2,000 of far longer runs", peers.yours.shown("warmup_steps")
        )
        return Verdict.of(key, "unusual" if long else "near", words)
    late = Message("a large part of the run does not learn at its rate")
    return _against(peers, key, peers.related, _Range("near", "unusual", 2.0, why_above=late))


_AS_MANY = Message("with about as many examples")


def _steps(peers: _Peers, key: str) -> Verdict | None:
    if peers.yours.kind == "pretrain":
        return None  # its tokens say it
    like = peers.within(peers.related, "rows", _LIKE_ROWS)
    among = _AS_MANY if peers.yours.number("rows") else ""
    below: Word = "behind"
    above: Word = "unusual"
    if (epochs := _epochs(peers, "epochs")) is not None:  # many updates of many examples are usual
        below, above = epochs.word, epochs.word
    return _against(peers, key, like, _Range(below, above, 1.5, among=among))


def _epochs(peers: _Peers, key: str) -> Verdict | None:
    own = peers.yours.number(key)
    if own is None or peers.yours.kind == "pretrain":
        return None
    like = peers.within(peers.related, "rows", _LIKE_ROWS)
    if own < _WHOLE:
        most = [r for r in like if r.number(key)][:3]
        told = joined(", ", [_told(r, key) for r in most])
        unseen = Message("{:.0%} of the examples are never seen", 1 - own)
        return Verdict.of(
            key, "behind", Message("{}; published {}: {}", unseen, _AS_MANY, told), most
        )
    among = _AS_MANY if peers.yours.number("rows") else ""
    heart = Message("what is read so often is learned by heart")
    return _against(peers, key, like, _Range("near", "unusual", 1.5, "", heart, among))


def _tokens_per_parameter(peers: _Peers, key: str) -> Verdict | None:
    if peers.yours.kind != "pretrain":
        words = Message(
            "a fine-tune is measured in epochs: what its base read counts, and is not known here"
        )
        return Verdict.of(key, "not comparable", words)
    optimal = Message("about 20 is the best use of compute (Chinchilla, arXiv:2203.15556)")
    return _against(peers, key, peers.alike, _Range("behind", "ahead", 1.5, why_below=optimal))


def _length(peers: _Peers, key: str) -> Verdict | None:
    short = Message("longer examples are dropped or cut")
    return _against(peers, key, peers.related, _Range("behind", "ahead", why_below=short))


def _precision(peers: _Peers, key: str) -> Verdict | None:
    own = peers.yours.get(key)
    users = [r for r in peers.related if r.get(key) == own]
    if own == "auto":
        return None
    if own == "fp16":
        bf16 = [r for r in peers.related if r.get(key) == "bf16"]
        words = Message(
            "{} of {} published compute in bf16: fp16 overflows above "
            "65,504, so that the loss is scaled and updates are skipped",
            len(bf16),
            len(bf16) + len(users),
        )
        return Verdict.of(key, "behind", words, bf16[:1])
    if own == "fp32":
        return Verdict.of(
            key, "near", Message("exact, and slower where bf16 is computed in hardware")
        )
    return Verdict.of(key, "near", Message("as {} of the published", len(users)), users[:1])


def _as_others(peers: _Peers, key: str) -> Verdict | None:
    """A word: near where a published setup has the same."""
    own = peers.yours.get(key)
    users = [r for r in peers.related if r.get(key) == own]
    if users:
        names = joined(", ", [r.title for r in users[:3]])
        return Verdict.of(key, "near", Message("as {}", names), users[:1])
    others = sorted({str(r.get(key)) for r in peers.related if r.get(key)})
    if not others:
        return None
    return Verdict.of(key, "unusual", Message("published: {}", ", ".join(others)))


def _decay_on(peers: _Peers, key: str) -> Verdict | None:
    if peers.yours.get(key) != "matrices":
        return None
    words = Message(
        "norms, biases and embeddings are left alone; one group for all weights pulls them too"
    )
    everywhere = [r for r in peers.related if r.get(key) == "every weight"]
    return Verdict.of(key, "ahead" if everywhere else "near", words, everywhere[:1])


def _clipping(peers: _Peers, key: str) -> Verdict | None:
    return _against(peers, key, peers.related, _Range("unusual", "unusual", 2.0))


def _decay(peers: _Peers, key: str) -> Verdict | None:
    return _against(peers, key, peers.related, _Range("near", "unusual", 1.5))


def _lora(peers: _Peers, key: str) -> Verdict | None:
    return _against(peers, key, peers.alike, _Range("unusual", "unusual", 2.0))


def _effort(peers: _Peers, key: str) -> Verdict | None:
    return Verdict.of(key, "not comparable", Message("other sizes, data and machines"))


def _loss(peers: _Peers, key: str) -> Verdict | None:
    return judged_loss(peers.yours, key)


_JUDGES: dict[str, Callable[[_Peers, str], Verdict | None]] = {
    "parameters": _parameters,
    "rows": _rows,
    "tokens_per_parameter": _tokens_per_parameter,
    "learning_rate": _learning_rate,
    "rate_ratio": _rate_ratio,
    "schedule": _as_others,
    "batch_rows": _batch_rows,
    "batch_tokens": _batch_tokens,
    "warmup_share": _warmup_share,
    "steps": _steps,
    "epochs": _epochs,
    "max_grad_norm": _clipping,
    "weight_decay": _decay,
    "decay_on": _decay_on,
    "max_seq_length": _length,
    "precision": _precision,
    "lora_r": _lora,
    "lora_scale": _lora,
    "lora_targets": _as_others,
    "hours": _effort,
    "initial_loss": _loss,
    "final_loss": _loss,
}
