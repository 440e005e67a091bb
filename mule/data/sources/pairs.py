"""Prompts and completions: {"prompt": "...", "completion": "..."}, as texts or lists of messages."""

from __future__ import annotations

from mule.data.sources.calls import tool_list
from mule.data.sources.format import Format
from mule.data.sources.items import Conversation, Message
from mule.data.sources.message import messages_of
from mule.data.sources.row import Row
from mule.data.sources.sharegpt import with_system
from mule.data.sources.turns import conversation


def spoken(row: Row, key: str, role: str) -> list[Message]:
    """What stands under `key`: a text said by `role`, or a list of messages."""
    if isinstance(row.value.get(key), list):
        return messages_of(row, key)
    return [Message(role, row.text(key))]


def _parse(row: Row) -> Conversation:
    answer = "response" if row.value.get("completion") is None else "completion"
    prompt = with_system(row, spoken(row, "prompt", "user"))
    return conversation(row, [*prompt, *spoken(row, answer, "assistant")], tool_list(row))


FORMAT = Format(
    "pairs",
    "conversation",
    "a prompt and its completion (or response), as mlx-lm and TRL write them",
    keys=(("prompt", "completion"), ("prompt", "response")),
    optional=("system", "tools", "functions"),
    parse=_parse,
)
