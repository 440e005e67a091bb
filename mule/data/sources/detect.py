"""Which format a row has, by the keys that are there and not null."""

from __future__ import annotations

import difflib
from collections.abc import Container
from typing import NoReturn

from mule.data.sources import (
    alpaca,
    code,
    dolly,
    gsm8k,
    messages,
    oasst,
    pairs,
    preference,
    sharegpt,
    text,
    text_rows,
    wikitext,
)
from mule.data.sources.format import Format
from mule.data.sources.options import ReadOptions
from mule.data.sources.row import Row
from mule.errors import UserError

FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        messages.FORMAT,
        sharegpt.FORMAT,
        alpaca.FORMAT,
        dolly.FORMAT,
        gsm8k.FORMAT,
        pairs.FORMAT,
        oasst.FORMAT,
        code.MBPP,
        code.HUMANEVAL,
        preference.FORMAT,
        text_rows.FORMAT,
        text.FORMAT,
        wikitext.FORMAT,
    )
}
TEXT_FORMATS = ("text", "wikitext")  # of whole files, not of rows
_ROW_FORMATS = [known for known in FORMATS.values() if known.keys]
_FIELDS = sorted(set().union(*(known.used for known in _ROW_FORMATS)))
_CONTENT = frozenset().union(*(known.content for known in _ROW_FORMATS))


class Detector:
    """Tells the format of rows, remembering what each set of keys means."""

    def __init__(self, options: ReadOptions) -> None:
        """Raises UserError for a format or a column that does not exist."""
        self._columns = options.columns
        self._forced = _named(options.format)
        for field, _ in self._columns:
            if field not in _FIELDS:
                near = difflib.get_close_matches(field, _FIELDS, n=1)
                raise UserError(
                    f"data.columns.{field}: no format has a field of this name",
                    f"did you mean data.columns.{near[0]}?" if near else f"use {_either(_FIELDS)}",
                )
        self._known: dict[tuple[str, ...], Format] = {}
        self._found: set[str] = set()
        self.unused: dict[str, None] = {}

    def mapped(self, row: Row) -> Row:
        """The row with its columns under the names of the fields they were mapped to."""
        if not self._columns:
            return row
        value = dict(row.value)
        moved = {field: value[name] for field, name in self._columns if name in value}
        for field, name in self._columns:
            value.pop(name, None)
            value.pop(field, None)
        self._found.update(name for _, name in self._columns if name in row.value)
        return Row({**value, **moved}, row.file, row.line)

    @property
    def columns(self) -> list[str]:
        """Every column that can matter, by the name it has in the file."""
        return [*_FIELDS, *(name for _, name in self._columns)]

    def missing(self) -> list[tuple[str, str]]:
        """The (field, column) mapped to a column that no row had."""
        return [(field, name) for field, name in self._columns if name not in self._found]

    def format_of(self, row: Row) -> Format:
        """Raises DataError when the keys fit no format, or several."""
        keys = tuple(key for key, value in row.value.items() if value is not None)
        known = self._known.get(keys)
        if known is None:
            known = self._known[keys] = self._find(row, keys)
            self.unused.update(dict.fromkeys(key for key in keys if key not in known.used))
        return known

    def _find(self, row: Row, keys: tuple[str, ...]) -> Format:
        if self._forced is not None:
            if not _fits(self._forced, keys) and not _fits(self._forced, row.value):
                self._fail_missing(row, self._forced)
            return self._forced
        found = _most_specific(keys) or _most_specific(row.value)  # a null is told by the parser
        if not found:
            self._fail_unknown(row, keys)
        names = [known.name for known in found]
        if len(found) > 1:
            row.fail(
                f"the keys {', '.join(keys)} fit several formats: {', '.join(names)}",
                "say which to read: " + " or ".join(f"data.format={name}" for name in names),
            )
        unread = [key for key in keys if key in _CONTENT and key not in found[0].used]
        if unread:
            row.fail(
                f'the format {names[0]} does not read "{unread[0]}", which the row has too',
                f"set data.format={names[0]} to leave it out, or name the columns of another "
                f"format, such as data.columns.input={unread[0]}",
            )
        return found[0]

    def _fail_missing(self, row: Row, forced: Format) -> NoReturn:
        nearest = max(forced.keys, key=lambda keys: len(set(keys) & row.value.keys()))
        missing = next(key for key in nearest if key not in row.value)
        row.fail(
            f'no "{missing}" in this row (found: {", ".join(row.value) or "nothing"}), '
            f"which {forced.name} needs",
            self._column_hint(row) or f'add "{missing}" to the row, or data.columns.{missing}=NAME',
        )

    def _fail_unknown(self, row: Row, keys: tuple[str, ...]) -> NoReturn:
        found = f"no known format has the keys {', '.join(keys) or '(none)'}"
        if hint := self._column_hint(row):
            row.fail(found, hint)
        nearest, needed = _nearest(keys)
        free = [key for key in keys if key not in needed]
        lacking = [key for key in needed if key not in keys]
        pairs = [
            f"data.columns.{ours}={theirs}" for ours, theirs in zip(lacking, free, strict=False)
        ]
        row.fail(
            f"{found}; nearest is {nearest.name} ({', '.join(needed)})",
            f"name the columns, as in {' '.join(pairs)}"
            if pairs
            else f'add "{lacking[0]}" to the row',
        )

    def _column_hint(self, row: Row) -> str:
        """What to do about a mapped column that this row lacks, or ""."""
        for field, name in self._columns:
            if name not in self._found:
                near = difflib.get_close_matches(name, row.value, n=1)
                better = f"; did you mean {near[0]}?" if near else ""
                return f'data.columns.{field}={name}, but there is no "{name}"{better}'
        return ""


def _named(name: str) -> Format | None:
    if name == "auto":
        return None
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        raise UserError(
            f"unknown format {name!r}",
            f"did you mean {near[0]}?" if near else f"use auto or one of {', '.join(FORMATS)}",
        )
    return FORMATS[name]


def _fits(known: Format, keys: Container[str]) -> bool:
    return any(all(key in keys for key in needed) for needed in known.keys)


def _most_specific(keys: Container[str]) -> list[Format]:
    """The formats that fit, without those of which another needs the same keys and more."""
    sets = [
        (set(needed), known)
        for known in _ROW_FORMATS
        for needed in known.keys
        if all(key in keys for key in needed)
    ]
    best = [known for needed, known in sets if not any(needed < other for other, _ in sets)]
    return list({known.name: known for known in best}.values())


def _nearest(keys: tuple[str, ...]) -> tuple[Format, tuple[str, ...]]:
    """The format with the most of `keys` and the fewest missing."""
    candidates = [(known, needed) for known in _ROW_FORMATS for needed in known.keys]
    best = max(candidates, key=lambda c: (len({*c[1]} & {*keys}), -len(c[1])))
    if {*best[1]} & {*keys}:
        return best
    fallback = text_rows.FORMAT if len(keys) < 2 else pairs.FORMAT
    return fallback, fallback.keys[0]


def _either(names: list[str]) -> str:
    return "one of " + ", ".join(names)
