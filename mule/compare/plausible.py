"""Whether losses can be what they are said to be, with the arithmetic."""

from __future__ import annotations

import math

from mule.compare.sourced import Setup
from mule.compare.verdict import Verdict

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
    return f"perplexity {math.exp(loss):,.0f}" if loss < 20 else "perplexity beyond all bounds"


def _first(setup: Setup, loss: float) -> Verdict:
    """A trained model knows language before the first update."""
    told = f"{loss:.3g} nats are {perplexity(loss)}"
    if loss < _UNTRAINED:
        return Verdict("initial_loss", "near", f"{told}, as a trained model may begin")
    guess, known = _uniform(setup)
    words = (
        f"{told}: no trained model begins there. GPT-2 124M, as released, has {_GPT2} on web text "
        f"({perplexity(_GPT2)}), larger ones less; {_larger(setup)}an untrained one begins at "
        f"ln({known}) = {guess:.3g}. Either the base is hardly trained, or the tokenizer or the "
        "template is not the one it was trained with"
    )
    return Verdict("initial_loss", "unusual", words, (_GPT2_SOURCE,))


def _first_of_new(setup: Setup, loss: float) -> Verdict:
    """A new model guesses evenly."""
    guess, known = _uniform(setup)
    told = f"a new model begins at ln({known}) = {guess:.3g}"
    if not setup.number("vocab_size"):
        return Verdict("initial_loss", "near", f"{told}, where the vocabulary is that large")
    if abs(loss - guess) <= _BEGINNING:
        return Verdict("initial_loss", "near", told)
    why = (
        "its first weights are too large"
        if loss > guess
        else "it is not new, or the first update logged is not the first"
    )
    return Verdict("initial_loss", "unusual", f"{told}; {loss:.3g} is far from it: {why}")


def _last(setup: Setup, loss: float) -> Verdict | None:
    told = f"{loss:.3g} nats are {perplexity(loss)}"
    if loss < _BY_HEART:
        words = f"{told}: the text is known by heart, or the answers stand in the prompts"
        return Verdict("final_loss", "unusual", words)
    if loss < _POOR:
        return Verdict("final_loss", "near", told)
    if setup.kind == "pretrain":
        short = f"{told}: little is learned yet (GPT-2 124M has {_GPT2} on web text)"
        return Verdict("final_loss", "behind", short, (_GPT2_SOURCE,))
    words = (
        f"{told}: at every token as unsure as among {math.exp(loss):,.0f} equal choices, and worse "
        f"than GPT-2 124M on web text ({_GPT2}, {perplexity(_GPT2)}); {_larger(setup)}it is no aim "
        "for a trained model"
    )
    return Verdict("final_loss", "unusual", words, (_GPT2_SOURCE,))


def _larger(setup: Setup) -> str:
    """What is often said of large models with such figures."""
    size = setup.number("parameters") or 0
    of_this = "this one" if size >= 1e9 else "a pretrained 7B to 13B model"
    return f"said of {of_this} it is implausible; "


def _uniform(setup: Setup) -> tuple[float, str]:
    """The loss of guessing evenly, and the vocabulary it is for."""
    size = setup.number("vocab_size") or _TYPICAL_VOCABULARY
    return math.log(size), f"{size:,.0f}"
