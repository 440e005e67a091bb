"""Chat templates, rendered in Jinja's sandbox with bounds on size, loops and output.

A template comes with a model, so it is foreign code. The sandbox keeps it from the machine; the
bounds here keep ordinary mistakes and crude attacks from filling the memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from mule.errors import ModelError

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_OUTPUT_CHARS = 2**20
MAX_RANGE_STEPS = 10_000  # of all range() loops of one rendering together
MAX_REPEATED_CHARS = 4096  # of one "x" * n

# They pad or format to a width given as a number, so one call can ask for gigabytes.
_WIDTH_METHODS = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "format"})
_WIDTH_FILTERS = ("center", "format", "wordwrap")

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
            self._template = _environment().from_string(source)
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
        pieces: list[str] = []
        num_chars = 0
        try:
            # What Template.generate does, but for its copies of the globals: twice as fast.
            template = self._template
            context = Context(template.environment, variables, template.name, template.blocks)
            for piece in template.root_render_func(context):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise SecurityError(f"its output exceeds {MAX_OUTPUT_CHARS:,} characters")
        except _TEMPLATE_FAILURES as error:
            raise ModelError(
                f"the chat template cannot render this conversation: {error or type(error).__name__}",
                "change the messages as it asks, or use another chat_template.jinja",
            ) from None
        return "".join(pieces)


# ---------------------------------------------------------------- the sandbox


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, without the operations whose result can be arbitrarily large."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "*" and not numbers and not _is_short_repeat(left, right):
            raise SecurityError("it repeats a string or list too often")
        if operator == "**" or (operator == "%" and not numbers):
            raise SecurityError(f"the operator {operator} is not allowed here")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _WIDTH_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


class _GenerationTag(Extension):
    """transformers' {% generation %} marks assistant text; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    for name in _WIDTH_FILTERS:
        del environment.filters[name]
    environment.filters["tojson"] = _tojson
    names: dict[str, Any] = environment.globals
    names["raise_exception"] = _raise_exception
    names["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _is_short_repeat(left: Any, right: Any) -> bool:
    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    return isinstance(count, int) and len(sequence) * count <= MAX_REPEATED_CHARS


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


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: Jinja's own filter would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
