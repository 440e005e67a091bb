"""The token that ends an answer is not trained.

What it sees: of the answers (runs of trained tokens) in the rows, as the trainer gets them, less than
half end with a stop token; from 90% on it is fine. Of documents: none of many ends with the token that
ends a document.
Why it matters: the model never learns to end. It answers well, and then goes on, with the user's next
turn or with the same sentence, until the limit cuts it off. The loss does not show it.
What to do: with data.too_long=truncate, raise data.max_seq_length or take data.too_long=drop; else look
at the last coloured token of an answer with `mule data preview RECIPE`, and end each turn with a stop
token in chat_template.jinja.
Source: the label contract (mule/data/contract.py); unslothai/unsloth and axolotl threads on endless
answers name this cause most often.
"""

from __future__ import annotations

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_FEW, _MOST = 0.5, 0.9
_FEWEST_ANSWERS, _EXPECTED_ENDS = 8, 20


def _check(history: History) -> Found | None:
    labels, data = history.facts.get("labels"), history.facts.get("data")
    if not labels or not data:
        return None
    return _of_chats(history, labels) if data["kind"] == "chat" else _of_documents(labels, data)


def _of_chats(history: History, labels: dict) -> Found | None:
    share = labels["stopped_answers_share"]
    if share is None or labels["num_answers"] < _FEWEST_ANSWERS or share >= _MOST:
        return None
    data = history.recipe.data
    remedy = Message(
        "mule data preview RECIPE: the last token of each answer must be a coloured stop token"
    )
    if data.too_long == "truncate":
        remedy = Message("data.max_seq_length={}, or data.too_long=drop", 2 * data.max_seq_length)
    return Found(
        "alarm" if share < _FEW else "warning",
        1,
        Message(
            "{:.0%} of {:,} answers end with a stop token that is trained: "
            "the model does not learn to end",
            share,
            labels["num_answers"],
        ),
        remedy,
        {"stopped_share": share, "answers": labels["num_answers"]},
    )


def _of_documents(labels: dict, data: dict) -> Found | None:
    """Documents end somewhere in the rows: none of so many is no chance."""
    expected = labels["num_sampled_tokens"] * data["num_examples"] / max(data["num_tokens"], 1)
    if labels["document_ends"] or expected < _EXPECTED_ENDS:
        return None
    return Found(
        "warning",
        1,
        Message(
            "no end of a document is trained, where {:.0f} were expected in "
            "{:,} tokens: the model does not learn to end",
            expected,
            labels["num_sampled_tokens"],
        ),
        Message(
            "name the token that ends a document as eos_token in the tokenizer's tokenizer_config.json"
        ),
        {"expected": expected},
    )


RULE = Rule("D504", "stop token untrained", _check, needs=("facts.data", "facts.labels"))
