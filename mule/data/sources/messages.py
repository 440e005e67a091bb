"""Chats: {"messages": [{"role": "user", "content": "..."}, ...]}."""

from __future__ import annotations

from typing import Any

from mule.data.sources.rows import ROLES, Conversation, Message, Row, type_name

KEYS = ("messages",)
_NEEDS_MORE = ("tools", "functions", "label")  # they change what is shown or what is learnt


def parse(row: Row) -> Conversation:
    messages = row.value.get("messages")
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else type_name(messages)
        row.fail(f'"messages" is {found}, not a list of messages', "give at least two messages")
    for key in _NEEDS_MORE:
        if row.value.get(key) not in (None, []):
            row.fail(
                f'"{key}" is not supported yet',
                "remove it, if these are plain chats whose every answer is to be learnt",
            )
    return row.conversation(*(_message(row, m, n) for n, m in enumerate(messages, start=1)))


def _message(row: Row, message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        row.fail(
            f"message {number} is {type_name(message)}, not an object",
            'a message is {"role": "user", "content": "..."}',
        )
    for key in ("role", "content"):
        if key not in message:
            row.fail(f'message {number} has no "{key}"', f'add "{key}" to it')
    if extra := [key for key in message if key not in ("role", "content")]:
        row.fail(
            f'message {number} has "{extra[0]}", which Mule does not use',
            'a message has "role" and "content" only',
        )
    if message["role"] not in ROLES:
        row.fail(
            f"message {number} has the unknown role {message['role']!r}",
            f"use one of {', '.join(ROLES)}",
        )
    content = row.checked_text(message["content"], f'"content" of message {number}')
    return Message(message["role"], content)
