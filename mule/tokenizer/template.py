"""Chat templates: a chat becomes the text that a model was taught, in a sandbox (sandbox.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jinja2
from jinja2.runtime import Context
from jinja2.sandbox import SecurityError

from mule.errors import ModelError
from mule.tokenizer.sandbox import Sandbox, fuelled

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_OUTPUT_CHARS = 2**20
MAX_RANGE_STEPS = 10_000  # of all range() loops of one rendering together

_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled chat template; `variables` are its bos_token, eos_token and so on.

    Raises ModelError when the template is too large or is not valid Jinja.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        if (num_bytes := len(source.encode())) > MAX_TEMPLATE_BYTES:
            raise ModelError(
                f"the chat template has {num_bytes:,} bytes; at most {MAX_TEMPLATE_BYTES:,} are read",
                "use a shorter chat_template.jinja",
            )
        try:
            self._template = fuelled(lambda: Sandbox().from_string(source))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(
                f"the chat template is not valid Jinja: {error}",
                "correct chat_template.jinja (or chat_template in tokenizer_config.json)",
            ) from None
        self._variables: dict[str, Any] = {**self._template.globals, **variables}

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The chat as text. Raises ModelError when the template refuses it or exceeds a bound."""
        variables = {
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "range": _bounded_range(),
        }
        try:
            return fuelled(lambda: self._text(variables))
        except _TEMPLATE_FAILURES as error:
            raise ModelError(
                f"the chat template cannot render this conversation: {error or type(error).__name__}",
                "change the messages as it asks, or use another chat_template.jinja",
            ) from None

    def _text(self, variables: dict[str, Any]) -> str:
        # What Template.generate does, but for its copies of the globals: twice as fast.
        template = self._template
        context = Context(template.environment, variables, template.name, template.blocks)
        pieces: list[str] = []
        num_chars = 0
        for piece in template.root_render_func(context):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > MAX_OUTPUT_CHARS:
                raise SecurityError(f"its output exceeds {MAX_OUTPUT_CHARS:,} characters")
        return "".join(pieces)


def _bounded_range() -> Any:
    steps_left = MAX_RANGE_STEPS

    def bounded(*args: int) -> Iterator[int]:
        nonlocal steps_left
        for value in range(*args):
            steps_left -= 1
            if steps_left < 0:
                raise SecurityError(f"its range() loops exceed {MAX_RANGE_STEPS:,} steps")
            yield value

    return bounded
