"""The base does not know the language of the rows.

What it sees: before the first update, the base finds the tokens of the rows no likelier in their order
than shuffled (a gain surely below 0.3 nats a token, by 2 standard errors): however foreign the subject,
the right weights gain whole nats. Or: with a chat template that is not the base's own, the same answers
are surely less likely than with its own (by 2 standard errors, and 0.05 nats a token). Or: the loss of
the first update lies more than a nat above that of rows from it as plain text, though answers have a
question before them and texts nothing.
Why it matters: weights and tokenizer do not belong together, the weights are random, or the markers of
the template mean nothing to the base. Fine-tuning then teaches the language anew, from a few rows. Where
the base knows the text and not the targets, these are not what follows: labels and rows were mixed up.
What to do: take the tokenizer that comes with the base (remove tokenizer.path), its own chat template,
and look at what model.path names (`mule chat BASE`); a base that is meant to be foreign needs
pretraining first.
Source: a shuffled text as control: Khandelwal et al. 2018 (arXiv 1805.04623); guessing among V tokens
has the loss ln V.
"""

from __future__ import annotations

import math
from typing import Any

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_LEAST_GAIN, _ERRORS = 0.3, 2.0  # nats a token; standard errors
_LEAST_COST = 0.05
_FAR_ABOVE = 1.0  # nats a token; sound runs begin below their plain text


def _check(history: History) -> Found | None:
    base = history.facts.get("base", {})
    first = history.rows[0]
    if not base:
        return None
    loss, guessing = first["loss"], math.log(history.facts["vocab_size"])
    figures = {"first_loss": loss, "guessing": guessing, **base}
    gain = base.get("order_gain")
    if gain is not None and gain + _ERRORS * base["order_gain_error"] < _LEAST_GAIN:
        return Found(
            "alarm",
            1,
            Message(
                "the base finds the rows no likelier in their order than shuffled ({:.2f} nats a "
                "token, ±{:.2f}; the first loss is {:.2f}, that of guessing "
                "{:.2f}): it does not know these tokens",
                gain,
                base["order_gain_error"],
                loss,
                guessing,
            ),
            _remedy(history),
            figures,
        )
    cost = base.get("template_cost")
    if cost is None or cost < max(_LEAST_COST, _ERRORS * base["template_cost_error"]):
        return (
            _foreign_targets(loss, base.get("plain_loss"), figures) if first["step"] == 1 else None
        )
    return Found(
        "warning",
        1,
        Message(
            "the chat template is not the base's own, and answers cost {:.2f} nats a token more with "
            "it (±{:.2f}) than with that",
            cost,
            base["template_cost_error"],
        ),
        Message("remove tokenizer.path, so that the base's own chat template is used"),
        figures,
    )


def _foreign_targets(loss: float, plain: float | None, figures: dict[str, Any]) -> Found | None:
    if plain is None or loss <= plain + _FAR_ABOVE:
        return None
    return Found(
        "warning",
        1,
        Message(
            "the first loss is {:.2f}, that of the same rows as plain text {:.2f}: the base knows "
            "the text, and not what it is to learn of it",
            loss,
            plain,
        ),
        Message("mule data preview RECIPE: are the coloured tokens what follows?"),
        figures,
    )


def _remedy(history: History) -> str:
    if history.recipe.tokenizer.path is not None:
        return Message("remove tokenizer.path: the base brings the tokenizer it was trained with")
    return Message(
        "mule chat {}: is this the trained model? else set model.path", history.recipe.model.path
    )


RULE = Rule(
    "D802",
    "wrong base or tokenizer",
    _check,
    ("fine-tune", "adapter"),
    ("loss", "facts.base"),
)
