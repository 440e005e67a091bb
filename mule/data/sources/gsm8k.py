"""Questions and answers: {"question": "...", "answer": "... #### 72"}, kept as published."""

from __future__ import annotations

from mule.data.sources.format import Format
from mule.data.sources.items import Conversation, Message
from mule.data.sources.row import Row
from mule.data.sources.turns import conversation


def _parse(row: Row) -> Conversation:
    question, answer = row.text("question"), row.text("answer")
    return conversation(row, [Message("user", question), Message("assistant", answer)])


FORMAT = Format(
    "gsm8k",
    "conversation",
    "questions and answers; GSM8K's word problems and all that look alike",
    keys=(("question", "answer"),),
    parse=_parse,
)
