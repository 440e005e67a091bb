"""Chats: {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}."""

from __future__ import annotations

from mule.data.sources.calls import tool_list
from mule.data.sources.format import Format
from mule.data.sources.items import Conversation
from mule.data.sources.message import messages_of
from mule.data.sources.row import Row
from mule.data.sources.turns import conversation


def _parse(row: Row) -> Conversation:
    return conversation(row, messages_of(row, "messages"), tool_list(row))


FORMAT = Format(
    "messages",
    "conversation",
    "chats as OpenAI and Hugging Face write them, with tools",
    keys=(("messages",),),
    optional=("tools", "functions"),
    parse=_parse,
)
