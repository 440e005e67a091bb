"""Progress and notices, told to whoever is listening.

Work calls `task`, `note` and `event`; the terminal, the browser or nobody (the default) shows them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol


class Sink(Protocol):
    """A listener. `fields` of `advance` are figures to show beside the bar (loss=..., rate=...)."""

    def start(self, key: int, description: str, total: float | None, unit: str) -> None: ...
    def advance(self, key: int, amount: float, fields: dict[str, Any]) -> None: ...
    def finish(self, key: int) -> None: ...
    def note(self, text: str, level: str) -> None: ...


class Silence:
    """The sink of a library call: nothing is shown."""

    def start(self, key: int, description: str, total: float | None, unit: str) -> None: ...
    def advance(self, key: int, amount: float, fields: dict[str, Any]) -> None: ...
    def finish(self, key: int) -> None: ...
    def note(self, text: str, level: str) -> None: ...


_sink: ContextVar[Sink] = ContextVar("sink", default=Silence())  # noqa: B039  (stateless)
_next_key = 0


class Task:
    """A running piece of work; `advance` moves its bar."""

    def __init__(self, sink: Sink, key: int) -> None:
        self._sink, self._key = sink, key

    def advance(self, amount: float = 1, **fields: Any) -> None:
        self._sink.advance(self._key, amount, fields)


@contextlib.contextmanager
def using(sink: Sink) -> Iterator[None]:
    """Send everything said inside the block to `sink`."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


@contextlib.contextmanager
def task(description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
    """A progress bar around a block: `with task("Packing", total=n) as bar: bar.advance()`."""
    global _next_key
    _next_key += 1
    sink, key = _sink.get(), _next_key
    sink.start(key, description, total, unit)
    try:
        yield Task(sink, key)
    finally:
        sink.finish(key)


def note(text: str, level: str = "info") -> None:
    """One line for the user; `level` is info or warning."""
    _sink.get().note(text, level)
