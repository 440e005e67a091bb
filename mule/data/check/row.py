"""One row as the checks see it, whatever its format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mule.data.check.findings import Place
from mule.data.sources.items import Conversation, Document, Item, Message

Part = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class CheckRow:
    """An item and where it belongs. `physical`: its line breaks are those of its file.

    `starts` is False for a document that goes on from the one before.
    """

    item: Item
    part: Part
    physical: bool = False
    starts: bool = True

    @property
    def kind(self) -> str:
        """document, conversation or preference."""
        return type(self.item).__name__.lower()

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """Every message; of a preference pair those of both answers."""
        item = self.item
        if isinstance(item, Document):
            return ()
        if isinstance(item, Conversation):
            return item.messages
        return (*item.prompt, *item.chosen, *item.rejected)

    @cached_property
    def texts(self) -> list[str]:
        """Every text a person or a model wrote in it."""
        if isinstance(self.item, Document):
            return [self.item.text]
        return [message.content for message in self.messages if message.content]

    @cached_property
    def answers(self) -> list[str]:
        """What the assistant says, its tool calls left out."""
        return [m.content for m in self.messages if m.role == "assistant" and m.content]

    @cached_property
    def prompt(self) -> str:
        """Everything before the last answer; "" for a document."""
        if not isinstance(self.item, Conversation):
            return ""
        return content_of(self.item.messages[:-1]) + self.item.tools

    @cached_property
    def content(self) -> str:
        """Everything that makes two rows the same row."""
        if isinstance(self.item, Document):
            return self.item.text
        tools = self.item.tools if isinstance(self.item, Conversation) else ""
        return content_of(self.messages) + tools

    def place(self, text: str = "", position: int = 0, within: str = "") -> Place:
        """This row's place; in a text file, the line of `position` in the text `within`."""
        line = self.item.line
        if self.physical and position:
            line += within.count("\n", 0, position)
        return Place(self.item.file, line, text)


def content_of(messages: Sequence[Message]) -> str:
    """Messages as one text that differs when they differ."""
    return "\n".join(
        "\x1f".join(
            (m.role, m.content, *(f"{call.name}({call.arguments})" for call in m.tool_calls))
        )
        for m in messages
    )
