"""Whether losses can be what they are said to be, with the arithmetic."""

from __future__ import annotations

import math

from mule.compare.sourced import Setup
from mule.compare.verdict import Verdict
from mule.message import Message

_UNTRAINED = 5.5  # nats: above, a model knows little more of a text than how often its tokens are
_POOR = 4.5  # nats: no trained model of 100M or more ends a fine-tune there
_GPT2 = 3.12  # GPT-2 124M as released, on OpenWebText (nanoGPT's README)
_TYPICAL_VOCABULARY = 32_000
_BEGINNING = 1.5  # nats beside ln(vocabulary) that a new model may begin at
_BY_HEART = 0.05
_GPT2_SOURCE = "GPT-2 124M: https://github.com/karpathy/nanoGPT, README.md"


def judged_loss(setup: Setup, key: str) -> Verdict | None:
    """The first or the last loss: near where it can be, unusual where it can hardly be."""
    loss = setup.number(key)
    if loss is None:
        return None
    if key == "initial_loss":
        return _first_of_new(setup, loss) if setup.kind == "pretrain" else _first(setup, loss)
    return _last(setup, loss)


def perplexity(loss: float) -> str:
    """e^loss, in words."""
    return (
        Message("perplexity {:,.0f}", math.exp(loss))
        if loss < 20
        else Message("perplexity beyond all bounds")
    )


def _first(setup: Setup, loss: float) -> Verdict:
    """A trained model knows language before the first update."""
    told = Message("{:.3g} nats are {}", loss, perplexity(loss))
    if loss < _UNTRAINED:
        return Verdict("initial_loss", "near", Message("{}, as a trained model may begin", told))
    guess, known = _uniform(setup)
    words = Message(
        "{}: no trained model begins there. GPT-2 124M, as released, has {} on web text "
        "({}), larger ones less; {}an untrained one begins at "
        "ln({}) = {:.3g}. Either the base is hardly trained, or the tokenizer or the "
        "template is not the one it was trained with",
        told,
        _GPT2,
        perplexity(_GPT2),
        _larger(setup),
        known,
        guess,
    )
    return Verdict("initial_loss", "unusual", words, (_GPT2_SOURCE,))


def _first_of_new(setup: Setup, loss: float) -> Verdict:
    """A new model guesses evenly."""
    guess, known = _uniform(setup)
    told = Message("a new model begins at ln({}) = {:.3g}", known, guess)
    if not setup.number("vocab_size"):
        return Verdict(
            "initial_loss", "near", Message("{}, where the vocabulary is that large", told)
        )
    if abs(loss - guess) <= _BEGINNING:
        return Verdict("initial_loss", "near", told)
    why = (
        Message("its first weights are too large")
        if loss > guess
        else Message("it is not new, or the first update logged is not the first")
    )
    return Verdict(
        "initial_loss",
        "unusual",
        Message("{}; {:.3g} is far from it: {}", told, loss, why),
    )


def _last(setup: Setup, loss: float) -> Verdict | None:
    told = Message("{:.3g} nats are {}", loss, perplexity(loss))
    if loss < _BY_HEART:
        words = Message("{}: the text is known by heart, or the answers stand in the prompts", told)
        return Verdict("final_loss", "unusual", words)
    if loss < _POOR:
        return Verdict("final_loss", "near", told)
    if setup.kind == "pretrain":
        short = Message("{}: little is learned yet (GPT-2 124M has {} on web text)", told, _GPT2)
        return Verdict("final_loss", "behind", short, (_GPT2_SOURCE,))
    words = Message(
        "{}: at every token as unsure as among {:,.0f} equal choices, and worse "
        "than GPT-2 124M on web text ({}, {}); {}it is no aim "
        "for a trained model",
        told,
        math.exp(loss),
        _GPT2,
        perplexity(_GPT2),
        _larger(setup),
    )
    return Verdict("final_loss", "unusual", words, (_GPT2_SOURCE,))


def _larger(setup: Setup) -> str:
    """What is often said of large models with such figures."""
    size = setup.number("parameters") or 0
    of_this = Message("this one") if size >= 1e9 else Message("a pretrained 7B to 13B model")
    return Message("said of {} it is implausible; ", of_this)


def _uniform(setup: Setup) -> tuple[float, str]:
    """The loss of guessing evenly, and the vocabulary it is for."""
    size = setup.number("vocab_size") or _TYPICAL_VOCABULARY
    return math.log(size), f"{size:,.0f}"
