"""Chats as a template writes them, and typed special tokens kept apart from the template's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from mule.errors import ModelError, UserError
from mule.tokenizer import tools as tool_text
from mule.tokenizer.template import ChatTemplate
from mule.tokenizer.tools import Messages, Shows, Tools

ROLES = ("system", "user", "assistant", "tool")

_MAX_FIRST_CHARACTERS = 8  # of special tokens, looked for one by one


class Chats:
    """A chat template and the special tokens whose text a message may hold.

    `variables` are the template's bos_token and so on; `specials` are all special tokens, which
    `pattern` finds in a text.
    """

    def __init__(
        self, source: str, variables: dict[str, str], specials: list[str], pattern: re.Pattern[str]
    ) -> None:
        self._template = ChatTemplate(source, variables)
        self._pattern = pattern
        first = {text[0] for text in specials if text}
        self._first_characters = first if len(first) <= _MAX_FIRST_CHARACTERS else None

    def render(
        self, messages: Messages, tools: Tools | None = None, *, add_generation_prompt: bool
    ) -> str:
        """The chat as text; tools as text where the template shows none."""
        if _check(messages) or tools:
            messages, tools = tool_text.as_text(messages, tools, self._shows)
        try:
            return self._template.render(
                messages, tools=tools, add_generation_prompt=add_generation_prompt
            )
        except ModelError as error:
            if messages[0]["role"] != "system" or self._shows.system:
                raise
            raise ModelError(
                f"this chat template takes no system message: {error.message}",
                "put its text at the beginning of the first user message, "
                "or use a chat_template.jinja that writes it",
            ) from None

    def protect(
        self, messages: Messages, tools: Tools | None = None
    ) -> tuple[Messages, Tools | None, str]:
        """The chat with every special token typed in it broken up by a mark, and that mark.

        The mark is "" when there is nothing to break up.
        """
        _check(messages)
        texts = list(_texts(messages, tools))
        if not any(map(self._is_typed, texts)):
            return messages, tools, ""
        used = set("".join(texts))
        mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)

        def broken(text: str) -> str:
            broken = self._pattern.sub(lambda match: mark.join(match[0]), text)
            if self._pattern.search(broken):
                raise typed_special_error("a special token of one character cannot be broken up")
            return broken

        marked = [{**_mapped(m, broken), "role": m["role"]} for m in messages]
        marked_tools = _mapped(tools, broken) if tools else tools
        prompts = messages[-1]["role"] != "assistant"
        text = self.render(marked, marked_tools, add_generation_prompt=prompts).replace(mark, "")
        if text != self.render(messages, tools, add_generation_prompt=prompts):
            raise typed_special_error("the chat template rewrites the messages")
        return marked, marked_tools, mark

    @cached_property
    def _shows(self) -> Shows:
        def render(messages: Messages, tools: Tools | None) -> str:
            prompts = messages[-1]["role"] != "assistant"
            return self._template.render(messages, tools=tools, add_generation_prompt=prompts)

        return tool_text.probe(render)

    def _is_typed(self, text: str) -> bool:
        if self._first_characters is None:
            return self._pattern.search(text) is not None
        for character in self._first_characters:  # ten times faster than the pattern alone
            if character in text:
                return self._pattern.search(text) is not None
        return False


def typed_special_error(reason: str) -> UserError:
    """What to raise where a message holds the text of a special token that cannot stay text."""
    return UserError(
        f"a message contains the text of a special token, and {reason}",
        "remove it from the message",
    )


def _check(messages: Messages) -> bool:
    """Refuse messages without a known role and a text; whether a tool is used in them."""
    if not messages:
        raise UserError("a chat without messages", 'give [{"role": "user", "content": "..."}]')
    uses_tools = False
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES:
            raise UserError(
                f"message {number} has the role {message.get('role')!r}",
                f"use one of {', '.join(ROLES)}",
            )
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {number} has no text", 'its "content" must be a string')
        if message["role"] == "tool":
            uses_tools = True
        elif message.get("tool_calls"):
            uses_tools = True
            _check_calls(message["tool_calls"], number)
    return uses_tools


def _check_calls(calls: Any, number: int) -> None:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments"), dict)
        ):
            raise UserError(
                f"message {number} has a tool call without a name and arguments",
                'write it as {"type": "function", "function": {"name": "...", "arguments": {...}}}',
            )


def _texts(messages: Messages, tools: Tools | None) -> Iterator[str]:
    """Every string that comes from the data."""
    for message in messages:
        yield message["content"]
        if len(message) > 2:
            yield from _strings([v for k, v in message.items() if k not in ("role", "content")])
    if tools:
        yield from _strings(tools)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return value
