"""What the terminal shows: bars and notes on stderr, results on stdout.

On a terminal bars are live, with the figures below them; elsewhere (a file, a pipe, a log) they are
plain lines, one every few seconds. NO_COLOR is honoured by rich.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mule.figures import duration, figure, figures_line
from mule.progress import Sink

_PLAIN_EVERY_S = 5.0  # between two plain lines of one task
_WORTH_A_LINE_S = 2.0  # a finished task shorter than this leaves no line
_WIDE = 200  # columns where there is no terminal to fit
_NEXT = {"en": "next: ", "fr": "ensuite\u00a0: "}


def consoles(as_json: bool) -> tuple[Console, Console]:
    """(results, notices): with --json stdout belongs to the JSON object alone."""
    notices = _console(stderr=True)
    return (notices if as_json else _console(stderr=False)), notices


def sink_for(console: Console) -> Sink:
    """The sink that fits where the notices go."""
    return LiveSink(console) if console.is_terminal else PlainSink(console)


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """A table; numbers to the right."""
    if title:
        console.print(Text(title, style="bold"))
    headed = any(column.strip() for column in columns)
    table = Table(box=None, pad_edge=False, show_header=headed)
    for index, column in enumerate(columns):
        numeric = any(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(figure(column, value)) for column, value in zip(columns, row)))
    console.print(table)


def print_result(console: Console, result: dict[str, Any]) -> None:
    """A command's result: its figures as one list, then each list of rows as a table."""
    nested = {"next"}
    for name, value in result.items():
        if isinstance(value, (dict, list)):
            nested.add(name)
    plain = [(name, value) for name, value in result.items() if name not in nested]
    width = max((len(name) for name, _ in plain), default=0)
    for name, value in plain:
        if value is not None:
            print_line(console, f"{name.replace('_', ' '):<{width}}  {figure(name, value)}")
    for name, value in result.items():
        if isinstance(value, dict) and value:
            print_rows(console, f"\n{name}", _rows_of(value))
        elif isinstance(value, list) and value:
            print_rows(console, f"\n{name}", value)


def _rows_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each entry: its own columns when all entries are dicts, else key and value."""
    if all(isinstance(entry, dict) for entry in value.values()):
        return [{"": key, **entry} for key, entry in value.items()]
    return [{"": key, " ": entry} for key, entry in _flat(value)]


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _flat(entry, f"{prefix}{key}.")
        elif isinstance(entry, list) and any(isinstance(item, dict) for item in entry):
            numbered = {str(number): item for number, item in enumerate(entry, start=1)}
            yield from _flat(numbered, f"{prefix}{key}.")
        elif isinstance(entry, list):
            yield prefix + key, ", ".join(figure(key, item) for item in entry) or None
        else:
            yield prefix + key, figure(key, entry)


def print_rows(console: Console, title: str, rows: Sequence[Any]) -> None:
    """A table of dicts, one a row, their keys as columns; or a plain list of words."""
    if not all(isinstance(row, dict) for row in rows):
        print_line(console, f"{title}: {', '.join(str(row) for row in rows)}")
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print_table(console, title, columns, [[row.get(name) for name in columns] for row in rows])


def print_line(console: Console, text: str) -> None:
    """One line as it is: no markup, no wrapping."""
    console.print(Text(text), soft_wrap=True)


def next_command(console: Console, text: str, language: str = "en") -> None:
    """The last line: what to type next."""
    console.print(Text.assemble((_NEXT[language], "dim"), (text, "bold")), soft_wrap=True)


def print_error(console: Console, message: str, hint: str) -> None:
    """An error and its remedy."""
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold"), hint), soft_wrap=True)


class LiveSink:
    """Bars on a terminal, the newest figures on a line below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: _Bars | None = None
        self._tasks: dict[int, tuple[TaskID, str, float]] = {}
        self._figures: dict[int, str] = {}

    def start(self, key: int, description: str, total: float | None, unit: str) -> None:
        if self._progress is None:
            self._progress = _Bars(self._console)
            self._progress.start()
        task = self._progress.add_task(description, total=total, unit=unit)
        self._tasks[key] = (task, description, time.monotonic())

    def advance(self, key: int, amount: float, fields: dict[str, Any]) -> None:
        if self._progress is None:
            return
        if fields:
            self._progress.figures = self._figures[key] = figures_line(fields)
        self._progress.advance(self._tasks[key][0], amount)

    def finish(self, key: int) -> None:
        task, description, started_at = self._tasks.pop(key)
        if self._progress is None:
            return
        took = time.monotonic() - started_at
        figures = self._figures.pop(key, "")
        self._progress.remove_task(task)
        if not self._tasks:
            self._progress.stop()
            self._progress = None
        if took >= _WORTH_A_LINE_S:
            print_line(self._console, _finished(description, took, figures))

    def note(self, text: str, level: str) -> None:
        _print_note(self._console, text, level)


class PlainSink:
    """Lines for a file or a pipe, at most one every few seconds for each task."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[int, _PlainTask] = {}

    def start(self, key: int, description: str, total: float | None, unit: str) -> None:
        self._tasks[key] = _PlainTask(description, total, unit)

    def advance(self, key: int, amount: float, fields: dict[str, Any]) -> None:
        task = self._tasks[key]
        if (line := task.advance(amount, fields, time.monotonic())) is not None:
            print_line(self._console, line)

    def finish(self, key: int) -> None:
        task = self._tasks.pop(key)
        took = time.monotonic() - task.started_at
        if took >= _WORTH_A_LINE_S:
            print_line(self._console, _finished(task.description, took, task.figures))

    def note(self, text: str, level: str) -> None:
        _print_note(self._console, text, level)


class _PlainTask:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description, self._total, self._unit = description, total, unit
        self.started_at = self._said_at = self._first_at = time.monotonic()
        self.figures = ""
        self._done = self._first = 0.0

    def advance(self, amount: float, fields: dict[str, Any], now: float) -> str | None:
        """Count; the line to print when the last one is old enough."""
        if not self._done:
            # A resumed run starts in the middle and the first update compiles: no rate from it.
            self._first, self._first_at = amount, now
        self._done += amount
        if fields:
            self.figures = figures_line(fields)
        if now - self._said_at < _PLAIN_EVERY_S:
            return None
        self._said_at = now
        parts = [f"{self.description} {self._count()}", self._left(now), self.figures]
        return " · ".join(part for part in parts if part)

    def _count(self) -> str:
        if not self._total:
            return f"{self._done:,.0f} {self._unit}".strip()
        share = f"({self._done / self._total:.0%})"
        return f"{self._done:,.0f}/{self._total:,.0f} {self._unit} {share}".replace("  ", " ")

    def _left(self, now: float) -> str:
        done = self._done - self._first
        if not self._total or done <= 0:
            return ""
        left = (now - self._first_at) / done * max(0.0, self._total - self._done)
        return f"{duration(left)} left"


class _Bars(Progress):
    """Bars with a line of figures below."""

    figures = ""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,  # enough to read, and cheap beside training
        )

    def get_renderables(self) -> Any:
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            line: RenderableType = Text(self.figures, style="dim", overflow="fold")
            yield line


def _finished(description: str, took: float, figures: str) -> str:
    line = f"{description}: done in {duration(took)}"
    return f"{line} · {figures}" if figures else line


def _print_note(console: Console, text: str, level: str) -> None:
    style = "yellow" if level == "warning" else "cyan"
    word = "warning" if level == "warning" else "note"
    console.print(Text.assemble((f"{word}: ", style), text), soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, width=_WIDE)
    return console
