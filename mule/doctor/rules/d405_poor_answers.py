r"""Poor answers despite a good loss.

What it sees: answers to evaluate.prompts, in the later half of the run and in the last two samples:
empty ones; ones with chat markup written out; ones that go round in circles (of their runs of 4 words
less than half are different); and, where most answers in the data are shorter, ones that never end. A
warning when it is half of the answers, the loss has fallen by a fifth, and the answers before training
were better: what the base did already, and the loops of a model trained on text alone, are notes.
Why it matters: the loss is measured on given words, each after the right ones before it. An answer is
made of the model's own words; a stop token that is never learned, or another chat template in use than
in training, does not show in the loss.
What to do: read the answers (`mule runs show RUN`), and the coloured labels of `mule data preview`;
for loops, generate with a repetition penalty or train longer; never-ending ones need their stop token.
Source: Holtzman et al. 2020 (arXiv 1904.09751) on loops of greedy decoding; Welleck et al. 2020
(arXiv 1908.04319).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import recent, start
from mule.message import Message

_FALLEN = 0.2  # share of the first loss
_HALF = 0.5
_LOOP_WORDS, _RUN, _DIFFERENT = 24, 4, 0.5
_SHORT = 0.5  # of what an answer may take here, are nine of ten in the data
_MARKUP = re.compile(
    r"<\|\w+\|>|\[/?INST\]|<</?SYS>>|</?s>|###\s*(Instruction|Response|Input)\b"
    r"|^\s*(User|Human|Assistant|System)\s*:",
    re.MULTILINE | re.IGNORECASE,
)


def _check(history: History) -> Found | None:
    trained = [sample for sample in history.samples if sample["step"] > 0]
    if len(trained) < 2 or trained[-1]["step"] < _HALF * history.num_steps:
        return None
    loss = history.series("loss")
    first, now = signals.median(start(loss).values), signals.median(recent(loss).values)
    if now > (1 - _FALLEN) * first:
        return None
    faults = [_faults(sample, history) for sample in trained[-2:]]
    base = [s for s in history.samples if s["step"] == 0]
    before = _faults(base[0], history) if base else {}
    for name, share in faults[-1].items():
        if share >= _HALF and faults[0].get(name, 0.0) >= _HALF:
            return _found(history, name, share, before.get(name, 0.0), trained)
    return None


def _found(
    history: History, name: str, share: float, before: float, trained: Sequence[dict[str, Any]]
) -> Found:
    is_new = before < _HALF and history.kind != "pretrain"
    answers = trained[-1]["answers"]
    prompt = next(iter(answers))
    return Found(
        "warning" if is_new else "note",
        trained[-2]["step"],
        Message(
            "{:.0%} of the answers {}, though the loss fell{}; for instance {!r} -> {!r}",
            share,
            name,
            "" if is_new else Message(" (as before training)") if before else "",
            prompt[:40],
            answers[prompt][:80],
        ),
        _REMEDIES[name],
        {"share": share, "before": before},
    )


_EMPTY, _MARKED, _LOOPING, _ENDLESS = (
    Message("are empty"),
    Message("have chat markup in them"),
    Message("go round in circles"),
    Message("never end"),
)
_REMEDIES: dict[str, Message] = {
    _EMPTY: Message("mule data preview RECIPE: look for rows whose answer is only its end"),
    _MARKED: Message(
        "mule data check DATA: markup is written as words in the rows, or the template differs"
    ),
    _LOOPING: Message(
        "mule chat RUN --repeat-penalty 1.1; or train on more, and on more varied answers"
    ),
    _ENDLESS: Message(
        "mule data preview RECIPE: each answer must end with its stop token, coloured"
    ),
}


def _faults(sample: dict[str, Any], history: History) -> dict[str, float]:
    """The share of a sample's answers with each fault, of those faults that can be judged."""
    answers = sample["answers"]
    is_chat = history.facts.get("data", {}).get("kind") == "chat"
    found: dict[str, float] = {_LOOPING: _share(answers.values(), _is_looping)}
    if is_chat:
        found |= {
            _EMPTY: _share(answers.values(), lambda text: not text.strip()),
            _MARKED: _share(answers.values(), lambda text: bool(_MARKUP.search(text))),
        }
        usual = history.facts.get("labels", {}).get("answer_tokens_p90")
        stopped, tokens = sample.get("stopped"), sample.get("tokens")
        if stopped and tokens and usual and usual <= _SHORT * max(tokens.values()):
            found[_ENDLESS] = sum(not value for value in stopped.values()) / len(stopped)
    return found


def _share(texts: Any, has: Any) -> float:
    texts = list(texts)
    return sum(map(bool, map(has, texts))) / max(len(texts), 1)


def _is_looping(text: str) -> bool:
    words = text.split()
    runs = list(zip(*(words[shift:] for shift in range(_RUN))))
    return len(words) >= _LOOP_WORDS and len(set(runs)) < _DIFFERENT * len(runs)


RULE = Rule("D405", "poor answers", _check, needs=("loss", "samples"))
