"""Which text of an item is compared with which."""

from __future__ import annotations

from mule.data.sources.items import Conversation, Document

TrainingItem = Document | Conversation


def whole_text(item: TrainingItem) -> str:
    """Everything in an item, roles and tools too: two exact duplicates have it in common."""
    if isinstance(item, Document):
        return item.text
    fields = [item.tools]
    for turn in item.messages:
        fields += [turn.role, turn.name or "", turn.content, str(turn.tool_calls or "")]
    return " \0 ".join(fields)  # no text holds a NUL: where a field ends is never in doubt


def said_text(item: TrainingItem) -> str:
    """What is said in an item, without its system prompt and tool descriptions.

    Those are often the same in every row, and would make short chats look alike.
    """
    return "\n".join(said_parts(item))


def said_parts(item: TrainingItem) -> list[str]:
    """The turns of a conversation after its system prompt, or the one text of a document."""
    if isinstance(item, Document):
        return [item.text]
    parts: list[str] = []
    for turn in item.messages:
        if turn.role != "system":
            parts += [turn.content, *(f"{call.name} {call.arguments}" for call in turn.tool_calls)]
    return [part for part in parts if part]


def prompt_text(item: TrainingItem) -> str | None:
    """The first question of a conversation; a document has none."""
    if isinstance(item, Document):
        return None
    return next((turn.content for turn in item.messages if turn.role == "user"), None)


def answer_text(item: TrainingItem) -> str | None:
    """What the assistant says and calls, which is what is learnt; a document has none."""
    if isinstance(item, Document):
        return None
    parts: list[str] = []
    for turn in item.messages:
        if turn.role == "assistant":
            parts += [turn.content, *(f"{call.name} {call.arguments}" for call in turn.tool_calls)]
    return "\n".join(parts)
