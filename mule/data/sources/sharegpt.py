"""ShareGPT's chats: {"conversations": [{"from": "human", "value": "..."}, ...]}.

"system" and "tools" may stand beside the list; an empty "system" there is none.
"""

from __future__ import annotations

from mule.data.sources.calls import tool_list
from mule.data.sources.format import Format
from mule.data.sources.items import Conversation, Message
from mule.data.sources.message import messages_of
from mule.data.sources.row import Row
from mule.data.sources.turns import conversation


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """`messages` after the row's own "system" text, if it has one."""
    if row.value.get("system") in (None, ""):
        return messages
    system = row.text("system")
    if not system.strip():
        return messages
    if messages and messages[0].role == "system":
        row.fail('"system" is given beside a first system message', "keep one of the two")
    return [Message("system", system), *messages]


def _parse(row: Row) -> Conversation:
    messages = with_system(row, messages_of(row, "conversations"))
    return conversation(row, messages, tool_list(row))


FORMAT = Format(
    "sharegpt",
    "conversation",
    "chats of from and value, as ShareGPT, FastChat and LLaMA-Factory write them",
    keys=(("conversations",),),
    optional=("system", "tools", "functions"),
    parse=_parse,
)
