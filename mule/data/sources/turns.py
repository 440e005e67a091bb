"""The order of a chat: who may speak after whom."""

from __future__ import annotations

from collections.abc import Sequence

from mule.data.sources.items import Conversation, Message
from mule.data.sources.row import Row

_ORDER = "after an optional first system message, user and assistant take turns"
_TOOL_ORDER = (
    "after a message with tool calls come the tools' answers, and a tool answers only then"
)


def conversation(row: Row, messages: Sequence[Message], tools: str = "") -> Conversation:
    """A checked conversation. Raises DataError when the turns are not in order."""
    check_order(row, messages)
    if all(message.role != "assistant" for message in messages):
        row.fail("no assistant message, so nothing to learn", "add the answer")
    return Conversation(tuple(messages), row.file, row.line, tools)


def check_order(row: Row, messages: Sequence[Message]) -> None:
    """Raises DataError when someone speaks out of turn, or an assistant says nothing."""
    allowed: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages, start=1):
        if message.role not in allowed:
            _fail_out_of_turn(row, number, message.role, allowed)
        if message.role == "assistant" and not (message.content.strip() or message.tool_calls):
            row.fail("an assistant message is empty", "write the answer, or remove the row")
        allowed = _after(message)


def _after(message: Message) -> tuple[str, ...]:
    if message.role == "system":
        return ("user",)
    if message.role == "user":
        return ("assistant",)
    if message.role == "tool":
        return ("tool", "assistant")
    return ("tool",) if message.tool_calls else ("user",)


def _fail_out_of_turn(row: Row, number: int, role: str, allowed: tuple[str, ...]) -> None:
    expected = allowed[-1]
    hint = _TOOL_ORDER if "tool" in (role, *allowed) else _ORDER
    if number == 1 and role == "assistant":
        hint = "remove this first message, or put the user's message before it"
    row.fail(f"message {number} is from {role} where {expected} must speak", hint)
