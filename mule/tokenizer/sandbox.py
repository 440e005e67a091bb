"""Jinja's immutable sandbox with fuel: a template ends soon, and stays small, whatever it says.

A template comes with a model, so it is foreign code. Jinja's sandbox keeps it from the machine. Here
every loop, call and text that it makes takes of the fuel of one rendering, and what could make
something huge in one step is bounded or not there. Nothing has to be sent to another process for
each of millions of chats, and a template that is stopped is stopped at the same place each time.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import filters, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_TEXT_CHARS = 2**20  # of any text or list that a template makes
MAX_REPEATED_CHARS = 4096  # of one "x" * n
MAX_STEPS = 1_000_000  # of one rendering; a text counts one for so many characters:
MAX_SECONDS = 10.0
_CHARS_A_STEP = 64
_FREE_CHARS = 256  # of a text that is written: paid for by the loop around it
_FREE_ADDITIONS = 64  # of one expression, whose texts are looked at only when it is done
_MAX_WIDTH = 64  # of an indentation
_MAX_PARTS = 10_000  # of batch and slice

# They pad or translate to a size of their own choice, so one call can ask for gigabytes.
_GROWING_METHODS = frozenset(
    """ljust rjust center zfill expandtabs format format_map translate encode to_bytes""".split()
)
_GROWING_FILTERS = ("center", "format", "wordwrap", "pprint", "urlize", "xmlattr")


class Fuel:
    """What is left of one rendering, in steps and in time."""

    def __init__(self) -> None:
        self._left = MAX_STEPS
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, steps: int) -> None:
        """Take so many steps; SecurityError when there are no more, or it took too long."""
        self._left -= steps
        if self._left < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")


_fuel: ContextVar[Fuel] = ContextVar("fuel")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of every chat template; `fuelled` compiles and renders."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=_shown,
        )
        for name in _GROWING_FILTERS:
            del self.filters[name]
        self.filters |= _FILTERS
        names: dict[str, Any] = self.globals
        del names["lipsum"]
        names["raise_exception"] = _raise_exception
        names["strftime_now"] = lambda form: datetime.now().strftime(form)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metered().visit(Parser(self, source, name, filename).parse())

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "*" and not numbers and not _is_short_repeat(left, right):
            raise SecurityError("it repeats a string or list too often")
        if operator == "**" or (operator == "%" and not numbers):
            raise SecurityError(f"the operator {operator} is not allowed here")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja's own format, which takes any width, is not offered."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes | int) and attr in _GROWING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        fuel = _fuel.get()
        fuel.spend(1)
        for value in (*args, *kwargs.values()):
            if isinstance(value, str | list | tuple):
                _kept(value)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "replace":
                given = {name: v for name, v in kwargs.items() if not name.startswith("_")}
                _check_replaced(owner, *args, **given)  # the others are Jinja's own
            elif __obj.__name__ == "join":
                return _join(args[0], owner)
        return super().call(__context, __obj, *args, **kwargs)


def fuelled(work: Callable[[], Any]) -> Any:
    """What `work` gives, done on the fuel of one rendering."""
    token = _fuel.set(Fuel())
    try:
        return work()
    finally:
        _fuel.reset(token)


# ---------------------------------------------------------------- what a template is turned into


class _Metered(NodeTransformer):
    """Puts the counting of steps into loops, macros, assignments and joined texts.

    As filters, which Jinja calls directly; a template cannot write their names. A text made by `+`
    can be no larger than its expression has parts: it is looked at where it gets a name.
    """

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered("looped", _Added().visit(node.iter), node, _weight(node))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        paid = _filtered("paid", nodes.Const(_weight(node)), node)
        node.body.insert(0, nodes.Output([paid], lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        self.generic_visit(node)
        node.node = _named(node.node)
        return node

    def visit_With(self, node: nodes.With) -> nodes.With:
        self.generic_visit(node)
        node.values = [_named(value) for value in node.values]
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [_counted(part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered("joined", nodes.List(node.nodes), node)


class _Added(NodeTransformer):
    """Looks at every text that `+` makes."""

    def visit_Add(self, node: nodes.Add) -> nodes.Filter:
        return _filtered("kept", self.generic_visit(node), node)


def _counted(node: Any) -> Any:
    """An expression of many additions looks at each."""
    many = sum(1 for _ in node.find_all(nodes.Add)) >= _FREE_ADDITIONS
    return _Added().visit(node) if many else node


def _named(node: Any) -> Any:
    if isinstance(node, nodes.Const | nodes.Name | nodes.Getattr):
        return node
    return _filtered("kept", _counted(node), node)


def _filtered(name: str, value: Any, node: nodes.Node, *args: int) -> nodes.Filter:
    constants = [nodes.Const(arg) for arg in args]
    made = nodes.Filter(value, f"mule:{name}", constants, [], None, None)
    made.set_lineno(node.lineno, override=False)
    assert node.environment is not None  # the parser sets it
    made.set_environment(node.environment)
    return made


def _weight(node: nodes.Node) -> int:
    """Steps of going through a body once: for itself, the texts in it, and those it writes."""
    chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    chars += _FREE_CHARS * sum(len(output.nodes) for output in node.find_all(nodes.Output))
    return 1 + chars // _CHARS_A_STEP


class _GenerationTag(Extension):
    """transformers' {% generation %} marks assistant text; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# ---------------------------------------------------------------- what is paid for


def _looped(iterable: Iterable[Any], weight: int) -> Iterator[Any]:
    """What a loop goes over, paid for: `weight` steps each time."""
    fuel = _fuel.get()
    for item in iterable:
        fuel.spend(weight)
        yield item


def _paid(steps: int) -> str:
    """Pay for the text of a macro."""
    _fuel.get().spend(steps)
    return ""


def _joined(values: list[Any]) -> str:
    """a ~ b ~ c"""
    return _kept("".join([_text(value) for value in values]))


def _kept(value: Any) -> Any:
    """A text or list that was made, if it is small enough."""
    if isinstance(value, Sized):
        _fuel.get().spend(1 + len(value) // _CHARS_A_STEP)
        _check_size(len(value))
    return value


def _check_size(size: int) -> None:
    if size > MAX_TEXT_CHARS:
        raise SecurityError(f"a text or list in it exceeds {MAX_TEXT_CHARS:,} characters")


def _shown(value: Any) -> Any:
    """What an expression writes: a text as it is; the size of anything else is counted first."""
    if isinstance(value, str):
        if len(value) > _FREE_CHARS:
            _kept(value)
    else:
        _count(value, _fuel.get())
    return value


def _count(value: Any, fuel: Fuel) -> None:
    """Pay for every part of a value: [x, x] of [x, x] ... is small in memory, and huge as text."""
    fuel.spend(1)
    if isinstance(value, str):
        fuel.spend(len(value) // _CHARS_A_STEP)
    elif isinstance(value, dict):
        for key, item in value.items():
            _count(key, fuel)
            _count(item, fuel)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _count(item, fuel)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        _count(value, _fuel.get())
    return str(value)


def _is_short_repeat(left: Any, right: Any) -> bool:
    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    return isinstance(count, int) and len(sequence) * count <= MAX_REPEATED_CHARS


def _check_replaced(text: str, old: str, new: str, count: int = -1) -> None:
    times = text.count(old) if count < 0 else min(count, text.count(old))
    size = len(text) + times * (len(new) - len(old))
    _check_size(size)
    _fuel.get().spend(1 + (len(text) + size) // _CHARS_A_STEP)


def _join(values: Iterable[Any], between: str) -> str:
    texts = [_text(value) for value in _listed(values)]
    _check_size(sum(map(len, texts)) + len(between) * len(texts))
    return _kept(between.join(texts))


def _listed(values: Iterable[Any]) -> list[Any]:
    return _kept(list(itertools.islice(values, MAX_TEXT_CHARS + 1)))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


# ---------------------------------------------------------------- filters with bounds


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: Jinja's own filter would escape HTML."""
    _count(value, _fuel.get())
    _bound("indent", 0 if indent is None else indent, _MAX_WIDTH)
    _bound("separators", max(map(len, separators or ("",))), _MAX_WIDTH)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _bound("indent", len(width) if isinstance(width, str) else width, _MAX_WIDTH)
    _kept(text)
    return _kept(filters.do_indent(text, width, first, blank))


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[Any]:
    return filters.do_batch(value, _bound("batch", linecount, _MAX_PARTS), fill_with)


def _slice(value: Any, slices: int, fill_with: Any = None) -> Iterator[Any]:
    return filters.sync_do_slice(value, _bound("slice", slices, _MAX_PARTS), fill_with)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    return filters.do_round(value, _bound("round", precision, _MAX_WIDTH), method)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text = _text(text)
    _check_replaced(text, str(old), str(new), -1 if count is None else count)
    return text.replace(str(old), str(new), -1 if count is None else count)


@jinja2.pass_environment
def _join_filter(
    environment: Sandbox, value: Iterable[Any], d: str = "", attribute: Any = None
) -> str:
    if attribute is not None:
        value = map(filters.make_attrgetter(environment, attribute), value)
    return _join(value, str(d))


def _bound(name: str, value: Any, most: int) -> Any:
    if isinstance(value, int | float) and not -most <= value <= most:
        raise SecurityError(f"{name} takes at most {most:,}")
    return value


_FILTERS: dict[str, Callable[..., Any]] = {
    "tojson": _tojson,
    "indent": _indent,
    "batch": _batch,
    "slice": _slice,
    "round": _round,
    "replace": _replace,
    "join": _join_filter,
    "list": _listed,
    "string": _text,
    "mule:looped": _looped,
    "mule:paid": _paid,
    "mule:kept": _kept,
    "mule:joined": _joined,
}
