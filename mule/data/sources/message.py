"""One message of a chat, in OpenAI's or ShareGPT's spelling.

{"role": "user", "content": "..."} and {"from": "human", "value": "..."} mean the same. A content of
several text parts is joined without anything between. An empty system message is kept: it is not
the same as none, because many templates then write a system prompt of their own.
"""

from __future__ import annotations

from typing import Any

from mule.data.sources.calls import parse_json, tool_call, tool_calls
from mule.data.sources.items import Message, ToolCall
from mule.data.sources.row import Row, type_name

# every spelling of a role, in lower case -> ours
ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLERS = ("function_call", "tool_call")  # roles whose text is the JSON of a call
_USED = ("name", "tool_calls", "function_call", "tool_call_id")
_EXAMPLE = 'a message is {"role": "user", "content": "..."}'


def messages_of(row: Row, key: str) -> list[Message]:
    """The list of messages under `key`. Raises DataError."""
    messages = row.value.get(key)
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else type_name(messages)
        row.fail(f'"{key}" is {found}, not a list of messages', f"write a list; {_EXAMPLE}")
    return [message(row, value, number) for number, value in enumerate(messages, start=1)]


def message(row: Row, value: Any, number: int) -> Message:
    """A checked message; `number` counts from 1. Raises DataError."""
    if not isinstance(value, dict):
        row.fail(f"message {number} is {type_name(value)}, not an object", _EXAMPLE)
    keys = (_either(value, "role", "from"), _either(value, "content", "value"))
    spoken = _role_text(row, value, keys[0], number)
    role = ROLE_NAMES[spoken]
    _refuse_unused(row, value, keys, role, number)
    if spoken in _CALLERS:
        text = _content(row, value, keys[1], number)
        return Message(role, "", tool_calls=_calls_in_text(row, text, number))
    calls = _calls(row, value, role, number)
    silent = calls and value.get(keys[1]) is None
    return Message(
        role,
        "" if silent else _content(row, value, keys[1], number),
        name=_text(row, value, "name", number),
        tool_calls=calls,
        tool_call_id=_text(row, value, "tool_call_id", number),
    )


def _either(value: dict[str, Any], key: str, other: str) -> str:
    return other if value.get(key) is None and other in value else key


def _role_text(row: Row, value: dict[str, Any], key: str, number: int) -> str:
    role = value.get(key)
    if role is None:
        row.fail(f'message {number} has no "{key}"', f'add "{key}" to it')
    if not isinstance(role, str) or role.lower() not in ROLE_NAMES:
        row.fail(
            f"message {number} has the unknown role {role!r}",
            f"use one of {', '.join(ROLE_NAMES)}",
        )
    return role.lower()


def _refuse_unused(
    row: Row, value: dict[str, Any], keys: tuple[str, str], role: str, number: int
) -> None:
    for key, given in value.items():
        if key in keys or key in _USED or given is None:
            continue
        if key in ("weight", "train") and given == (role == "assistant"):
            continue  # it says what Mule does anyway
        if key in ("weight", "train"):
            row.fail(
                f'message {number} has "{key}": {given}, which Mule does not use: every answer '
                "of the assistant is trained, and nothing else",
                f'remove "{key}", or leave the row out',
            )
        row.fail(
            f'message {number} has "{key}", which Mule does not use',
            f'remove it; a message has "{keys[0]}", "{keys[1]}", {", ".join(_USED)} only',
        )


def _content(row: Row, value: dict[str, Any], key: str, number: int) -> str:
    if key not in value:
        row.fail(f'message {number} has no "{key}"', f'add "{key}" to it')
    content, name = value[key], f'"{key}" of message {number}'
    if not isinstance(content, list):
        return row.checked_text(content, name)
    return "".join(_part(row, part, f"part {n} of {name}") for n, part in enumerate(content, 1))


def _part(row: Row, part: Any, name: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind is None:
        row.fail(
            f"{name} is {type_name(part)}, not an object",
            'a part is {"type": "text", "text": "..."}',
        )
    if kind != "text":
        row.fail(
            f"{name} is of the type {kind!r}, and Mule learns from text only",
            "remove the part, or leave the row out",
        )
    return row.checked_text(part.get("text"), f'"text" of {name}')


def _calls(row: Row, value: dict[str, Any], role: str, number: int) -> tuple[ToolCall, ...]:
    several, one = value.get("tool_calls") or None, value.get("function_call")
    if several is None and one is None:
        return ()
    if role != "assistant":
        row.fail(f"message {number} is from {role} and calls a tool", "only an assistant can")
    if one is not None:
        return (tool_call(row, one, f'"function_call" of message {number}'),)
    return tool_calls(row, several, f'"tool_calls" of message {number}')


def _calls_in_text(row: Row, text: str, number: int) -> tuple[ToolCall, ...]:
    name = f"message {number}"
    found = parse_json(row, text, name)
    if isinstance(found, list) and found:
        return tool_calls(row, found, name)
    return (tool_call(row, found, name),)


def _text(row: Row, value: dict[str, Any], key: str, number: int) -> str | None:
    found = value.get(key)
    return None if found is None else row.checked_text(found, f'"{key}" of message {number}')
