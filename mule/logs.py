"""Rows of a log: read, and held as numbers in a quarter of the memory that dictionaries take."""

from __future__ import annotations

import contextlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

Row = dict[str, Any]
_PARSED_LINES = 500  # at once: other threads have to wait meanwhile
_WHOLE = 2**53  # up to here a float64 holds every integer


class Rows(Sequence[Row]):
    """Rows in their order; each is made anew when it is asked for, so changing one keeps nothing."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._numbers = array("d")
        self._others: dict[int, Any] = {}  # place in `_numbers` -> what is no number
        self._starts, self._shape_of = array("q"), array("L")  # of each row
        self._shapes: list[dict[str, type]] = []  # what rows may hold: key -> int, float or object
        self._shape_numbers: dict[tuple[tuple[str, type], ...], int] = {}
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        return len(self._starts)

    def append(self, row: Row) -> None:
        """Add a row at the end."""
        kinds = [_kind(value) for value in row.values()]
        shape = tuple(zip(row, kinds))
        number = self._shape_numbers.setdefault(shape, len(self._shapes))
        if number == len(self._shapes):
            self._shapes.append(dict(shape))
        self._starts.append(len(self._numbers))
        self._shape_of.append(number)
        for value, kind in zip(row.values(), kinds):
            if kind is object:
                self._others[len(self._numbers)] = value
            self._numbers.append(0.0 if kind is object else value)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        start, shape = self._starts[place], self._shapes[self._shape_of[place]]
        return {name: self._value(at, kind) for at, (name, kind) in enumerate(shape.items(), start)}

    def __iter__(self) -> Iterator[Row]:
        return (self[place] for place in range(len(self)))

    def pick(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """The values of these keys in every row, None where there is none."""
        found = []  # by shape: where each name lies behind a row's start, and of what kind it is
        for shape in self._shapes:
            places = {name: (place, kind) for place, (name, kind) in enumerate(shape.items())}
            found.append([places.get(name) for name in names])
        for start, shape_number in zip(self._starts, self._shape_of):
            yield tuple(
                None if place is None else self._value(start + place[0], place[1])
                for place in found[shape_number]
            )

    def _value(self, at: int, kind: type) -> Any:
        if kind is object:
            return self._others[at]
        return int(self._numbers[at]) if kind is int else self._numbers[at]


def pick(rows: Sequence[Row], *names: str) -> Iterator[tuple[Any, ...]]:
    """The values of these keys in every row, None where there is none; quick for `Rows`."""
    if isinstance(rows, Rows):
        return rows.pick(*names)
    return (tuple(row.get(name) for name in names) for row in rows)


def _kind(value: Any) -> type:
    kind = type(value)
    return kind if kind is float or (kind is int and -_WHOLE <= value <= _WHOLE) else object


# ---------------------------------------------------------------- reading


def read_log(path: Path | str) -> list[Row]:
    """The rows of a JSONL log; a line cut off by a crash is left out."""
    return list(iter_log(path))


def iter_log(path: Path | str) -> Iterator[Row]:
    """The rows of a JSONL log one by one, a piece of it in memory at a time."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        while lines := list(itertools.islice(file, _PARSED_LINES)):
            yield from _rows_of([line for line in lines if line.endswith(b"\n")])


def read_log_from(path: Path | str, start: int) -> tuple[list[Row], int]:
    """The rows behind byte `start` of a JSONL log, and the byte at which the next ones will begin.

    A line in whose middle `start` lies is left out, as is one cut off by a crash.
    """
    first = max(0, start - 1)  # a newline there says that a line begins at `start`
    try:
        with open(path, "rb") as file:
            file.seek(first)
            content = file.read()
    except FileNotFoundError:
        return [], start
    whole, _, torn = content.rpartition(b"\n")
    lines, size = whole.split(b"\n")[1 if start else 0 :], _PARSED_LINES
    rows = [row for at in range(0, len(lines), size) for row in _rows_of(lines[at : at + size])]
    return rows, max(start, first + len(content) - len(torn))


def _rows_of(lines: list[bytes]) -> list[Row]:
    """Those of the lines that are JSON; all in one go where they are, which is faster."""
    with contextlib.suppress(ValueError):  # not JSON, or not UTF-8
        rows = json.loads(b"[" + b",".join(lines) + b"]")
        if len(rows) == len(lines):
            return rows
    return [row for line in lines for row in _rows_of([line])] if len(lines) > 1 else []
