"""Alpaca's instructions: {"instruction": "...", "input": "...", "output": "..."}."""

from __future__ import annotations

from mule.data.sources.rows import Conversation, Message, Row

KEYS = ("instruction", "output")


def parse(row: Row) -> Conversation:
    """The instruction, a blank line and the input (if any) make the user's message."""
    question = row.text("instruction")
    if row.value.get("input") is not None and (context := row.text("input")).strip():
        question = f"{question}\n\n{context}"
    return row.conversation(Message("user", question), Message("assistant", row.text("output")))
