"""Tools, calls and results as text, for chat templates that do not write them.

One form for training and for serving, the one Hermes and Qwen models know: the functions in the
system message (where the template takes none: before the first user's words), a call in the
assistant's text, a result in a user message unless the template knows the role "tool".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mule.errors import ModelError

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]

_BEFORE = """\
# Tools

You may call the functions described here, one JSON object a line:
<tools>
"""
_AFTER = """
</tools>

To call a function, write its name and its arguments as JSON between these tags:
<tool_call>
{"name": "the function's name", "arguments": {"the argument's name": "its value"}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Shows:
    """What a chat template writes by itself; the rest becomes text."""

    system: bool
    tools: bool
    calls: bool
    results: bool


def as_text(messages: Messages, tools: Tools | None, shows: Shows) -> tuple[Messages, Tools | None]:
    """The chat with all that the template does not show written into its texts."""
    if tools and not shows.tools:
        messages, tools = _with_tools(messages, tools, shows.system), None
    if not shows.calls:
        messages = [_with_calls(message) for message in messages]
    if not shows.results:
        messages = _with_results(messages)
    return messages, tools or None


def probe(render: Callable[[Messages, Tools | None], str]) -> Shows:
    """Find out what a template shows by rendering it with names that occur nowhere else.

    `render` raises ModelError where the template refuses the chat.
    """

    def writes(messages: Messages, tools: Tools | None, *marks: str) -> bool:
        try:
            text = render(messages, tools)
        except ModelError:
            return False
        return all(mark in text for mark in marks)

    ask = {"role": "user", "content": "mule_ask"}
    system = writes([{"role": "system", "content": "mule_system"}, ask], None, "mule_system")
    tools = writes([ask], [_TOOL], "mule_tool", "mule_purpose", "mule_key")
    offered = [_TOOL] if tools else None
    answer = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    calls = writes([ask, answer], offered, "mule_tool", "mule_key", "mule_value")
    called = [ask, answer if calls else _with_calls(answer)]
    results = _knows_results(render, called, offered)
    return Shows(system=system, tools=tools, calls=calls, results=results)


def _knows_results(
    render: Callable[[Messages, Tools | None], str], called: Messages, tools: Tools | None
) -> bool:
    """Whether a result is written, and otherwise than what a user or the assistant says."""
    texts = []
    for role in ("tool", "user", "assistant"):
        message = {"role": role, "content": "mule_result", **(_CALLED if role == "tool" else {})}
        try:
            texts.append(render([*called, message], tools).partition("mule_result")[:2])
        except ModelError:
            texts.append(("", ""))
    return texts[0][1] != "" and texts[0] not in texts[1:]


# Mistral's templates want call ids of nine letters and digits.
_CALLED = {"name": "mule_tool", "tool_call_id": "mulecall1"}
_CALL = {
    "id": _CALLED["tool_call_id"],
    "type": "function",
    "function": {"name": "mule_tool", "arguments": {"mule_key": "mule_value"}},
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "mule_tool",
        "description": "mule_purpose",
        "parameters": {
            "type": "object",
            "properties": {"mule_key": {"type": "string", "description": "a word"}},
            "required": ["mule_key"],
        },
    },
}


def _with_tools(messages: Messages, tools: Tools, takes_system: bool) -> Messages:
    lines = "\n".join(_json(tool) for tool in tools)
    text = _BEFORE + lines + _AFTER
    first = messages[0]
    if first["role"] == "system":
        return [first | {"content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    if takes_system or first["role"] != "user":
        return [{"role": "system", "content": text}, *messages]
    return [first | {"content": f"{text}\n\n{first['content']}"}, *messages[1:]]


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    words = [message["content"]] if message["content"] else []
    for call in message["tool_calls"]:
        function = call["function"]
        body = _json({"name": function["name"], "arguments": function["arguments"]})
        words.append(f"<tool_call>\n{body}\n</tool_call>")
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return kept | {"content": "\n".join(words)}


def _with_results(messages: Messages) -> Messages:
    """Results as user messages; those that follow each other in one, as roles must alternate."""
    written: Messages = []
    previous = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if previous == "tool":
                content = f"{written.pop()['content']}\n{content}"
            message = {"role": "user", "content": content}
        written.append(message)
        previous = role
    return written


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
