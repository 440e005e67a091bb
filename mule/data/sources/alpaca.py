"""Alpaca's instructions: {"instruction": "...", "input": "...", "output": "..."}.

`response` may stand for `output`; "system" and "history" ([[question, answer], ...]) are used.
"""

from __future__ import annotations

from mule.data.sources.format import Format
from mule.data.sources.items import Conversation, Message
from mule.data.sources.row import Row, type_name
from mule.data.sources.sharegpt import with_system
from mule.data.sources.turns import conversation


def prompt_of(row: Row, context: str = "input") -> list[Message]:
    """System, history, and the instruction with a blank line and the context (if any)."""
    question = row.text("instruction")
    if row.value.get(context) is not None and (text := row.text(context)).strip():
        question = f"{question}\n\n{text}"
    return with_system(row, [*_history(row), Message("user", question)])


def _parse(row: Row) -> Conversation:
    answer = "response" if row.value.get("output") is None and "response" in row.value else "output"
    return conversation(row, [*prompt_of(row), Message("assistant", row.text(answer))])


def _history(row: Row) -> list[Message]:
    rounds = row.value.get("history")
    if rounds in (None, "", []):
        return []
    if not isinstance(rounds, list):
        row.fail(
            f'"history" is {type_name(rounds)}, not a list of [question, answer]',
            'write [["question", "answer"], ...]',
        )
    messages = []
    for number, pair in enumerate(rounds, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            row.fail(
                f'round {number} of "history" is not a pair of texts',
                'write [["question", "answer"], ...]',
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(Message(role, row.checked_text(text, f'round {number} of "history"')))
    return messages


FORMAT = Format(
    "alpaca",
    "conversation",
    "instructions with an optional input, as Alpaca and LLaMA-Factory write them",
    keys=(("instruction", "output"), ("instruction", "response")),
    optional=("input", "system", "history"),
    parse=_parse,
)
