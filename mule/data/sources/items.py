"""What rows become: documents, conversations, preference pairs. Immutable, and hashable."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Document:
    """A text to learn to continue; where `ends` is False, the next Document goes on with it.

    `source` and `category` are what the row says of itself, or ""; nothing is learnt from them.
    """

    text: str
    file: str
    line: int
    ends: bool = True
    source: str = field(default="", compare=False)
    category: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function the assistant calls; `arguments` is the JSON text of an object."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A turn. Content is "" only where an assistant calls tools and says nothing."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The message as a chat template takes it; unset fields are left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [_call_as_dict(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """At most one system message first, then turns in order, with an answer.

    `tools` is the JSON text of the list of function descriptions the assistant may call, or "".
    `source` and `category` are what the row says of itself, or ""; nothing is learnt from them.
    """

    messages: tuple[Message, ...]
    file: str
    line: int
    tools: str = ""
    source: str = field(default="", compare=False)
    category: str = field(default="", compare=False)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        return [message.as_dict() for message in self.messages]

    def tool_list(self) -> list[dict[str, Any]] | None:
        """The tools as a chat template takes them."""
        return json.loads(self.tools) if self.tools else None


@dataclass(frozen=True, slots=True)
class Preference:
    """Answers judged against each other (chosen, rejected), or one judged alone (`label`).

    Read and checked; Mule does not train on them.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    label: bool | None
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something left out or not used, which is no mistake but must be said.

    `lost` is True where words that could be learnt were left out.
    """

    file: str
    line: int | None
    message: str
    lost: bool = False

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.message}"


Item = Document | Conversation | Preference


def _call_as_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    named = {} if call.id is None else {"id": call.id}
    return {**named, "type": "function", "function": function}
