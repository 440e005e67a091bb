"""GSM8K's word problems: {"question": "...", "answer": "... #### 72"}, kept as published."""

from __future__ import annotations

from mule.data.sources.rows import Conversation, Message, Row

KEYS = ("question", "answer")


def parse(row: Row) -> Conversation:
    return row.conversation(
        Message("user", row.text("question")), Message("assistant", row.text("answer"))
    )
