"""One data file from its first row to its last, in whatever format it has."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from mule.data.sources import text, wikitext
from mule.data.sources.detect import TEXT_FORMATS, Detector
from mule.data.sources.encoding import read_text_parts
from mule.data.sources.files import SUFFIXES, OnBytes, data_suffix, refuse_other_kinds
from mule.data.sources.format import ORIGIN, Collector, Format
from mule.data.sources.items import Document, Item, Notice, Preference
from mule.data.sources.options import ReadOptions
from mule.data.sources.row import Row
from mule.data.sources.rows import scan_rows
from mule.errors import DataError

Found = Item | DataError | Notice
_MAX_NAME = 40  # characters of a source or a category


def items_of(
    file: Path, options: ReadOptions, on_bytes: OnBytes | None, *, training: bool
) -> Iterator[Found]:
    """Everything in a file, in order; problems and notices are values.

    For `training`, rows that are not to be trained on and rows of another format are problems at
    once; else they are items, and several formats are one problem after the last row.
    Raises UserError for options that do not exist.
    """
    reading = _RowReading(file, options, training)  # checks the options, for text files too
    try:
        if is_text(file, options):
            yield from _documents(file, options, on_bytes)
        else:
            yield from reading.items(on_bytes)
    except DataError as error:
        yield error


def format_of(file: Path, options: ReadOptions, max_rows: int | None = None) -> str:
    """The name of a file's format, by all its rows or the first `max_rows`. Raises DataError."""
    detector = Detector(options)
    if is_text(file, options):
        return _text_format(options, _begun(read_text_parts(file))[0])
    lines: dict[str, int] = {}
    for row in islice(scan_rows(file), max_rows):
        if isinstance(row, DataError):
            raise row
        name = detector.format_of(detector.mapped(row)).name
        if lines and name not in lines:
            raise _other_format(row, name, *next(iter(lines.items())))
        lines.setdefault(name, row.line)
    return next(iter(lines))


def is_text(file: Path, options: ReadOptions) -> bool:
    """Whether a file is read as text, not as rows. Raises DataError for no kind of data."""
    if options.format != "auto":
        return options.format in TEXT_FORMATS
    suffix = data_suffix(file)
    if suffix in text.SUFFIXES:
        return True
    if suffix in SUFFIXES:
        return False
    refuse_other_kinds(file)
    raise DataError(
        file,
        None,
        f"unknown kind of file {file.suffix!r}",
        f"rename it to one of {', '.join(SUFFIXES)}, or set data.format",
    )


# ---------------------------------------------------------------- rows


class _RowReading:
    """The rows of a file on their way to items."""

    def __init__(self, file: Path, options: ReadOptions, training: bool) -> None:
        self._file, self._options, self._training = file, options, training
        self._detector = Detector(options)
        self._forced = options.format != "auto"
        self._lines: dict[str, tuple[int, int]] = {}  # of each format: its first line, its rows
        self._collectors: dict[str, Collector] = {}
        self._names: dict[str, None] = {}  # every column seen

    def items(self, on_bytes: OnBytes | None) -> Iterator[Found]:
        for row in scan_rows(self._file, on_bytes, self._needed_columns()):
            if isinstance(row, DataError):
                yield row
                continue
            self._names.update(dict.fromkeys(row.value))
            try:
                yield from self._items_of(self._detector.mapped(row))
            except DataError as error:
                yield error
        for collector in self._collectors.values():
            yield from collector.finish()
        yield from self._told_last()

    def _needed_columns(self) -> list[str] | None:
        """Of a Parquet file, the columns some format uses; None for all of them."""
        if data_suffix(self._file) != ".parquet":
            return None
        first = next(scan_rows(self._file), None)
        if not isinstance(first, Row):
            return None
        try:
            self._detector.format_of(self._detector.mapped(first))
        except DataError:
            return None  # told again for the whole row, with all its columns
        self._names.update(dict.fromkeys(first.value))
        return self._detector.columns

    def _items_of(self, row: Row) -> Iterator[Found]:
        known = self._detector.format_of(row)
        self._check_use(row, known)
        line, num_rows = self._lines.get(known.name, (row.line, 0))
        self._lines[known.name] = (line, num_rows + 1)
        if known.parse is not None:
            yield _with_origin(known.parse(row), row)
        elif known.collect is not None:
            if known.name not in self._collectors:
                self._collectors[known.name] = known.collect(str(self._file), self._options)
            yield from self._collectors[known.name].add(row)

    def _check_use(self, row: Row, known: Format) -> None:
        """Refuse what cannot be trained on: another format than before, or such a format."""
        if not self._training:
            return
        if self._lines and known.name not in self._lines:
            name, (line, _) = next(iter(self._lines.items()))
            raise _other_format(row, known.name, name, line)
        if known.refuse and (known.kind == "preference" or not self._forced):
            known.refuse(row)

    def _told_last(self) -> Iterator[DataError | Notice]:
        if len(self._lines) > 1:
            counts = ", ".join(
                f"{name} ({num_rows:,} rows, the first at line {line})"
                for name, (line, num_rows) in self._lines.items()
            )
            yield DataError(
                self._file,
                None,
                f"rows of several formats: {counts}",
                "put each format into a file of its own",
            )
        for field, name in self._detector.missing():
            near = difflib.get_close_matches(name, self._names, n=1)
            yield DataError(
                self._file,
                None,
                f'data.columns.{field}={name}, but no row has "{name}"',
                f"did you mean {near[0]}?" if near else f"it has: {', '.join(self._names)}",
            )
        if unused := list(self._detector.unused):
            yield Notice(str(self._file), None, f"not used: {', '.join(unused)}")


def _with_origin(item: Item, row: Row) -> Item:
    """The item with the source and the category its row names, where those are short names."""
    found = {key: row.value[key] for key in ORIGIN if row.value.get(key)}
    names = {key: name.strip() for key, name in found.items() if _is_short_name(name)}
    if not names or isinstance(item, Preference):
        return item
    return replace(item, **names)


def _is_short_name(value: object) -> bool:
    """Not an address, a sentence, or a list."""
    if not isinstance(value, str) or len(value) > _MAX_NAME:
        return False
    return value.isprintable() and "://" not in value


def _other_format(row: Row, name: str, first_name: str, first_line: int) -> DataError:
    return DataError(
        row.file,
        row.line,
        f"a row of the format {name}, where line {first_line} is {first_name}",
        "put each format into a file of its own",
    )


# ---------------------------------------------------------------- text


def _documents(file: Path, options: ReadOptions, on_bytes: OnBytes | None) -> Iterator[Document]:
    start, parts = _begun(read_text_parts(file, on_bytes))
    if _text_format(options, start) == "text":
        yield from text.documents(str(file), parts)
        return
    if not wikitext.is_wikitext(start):
        raise DataError(
            file,
            None,
            "not WikiText: its first line is no ` = Title = `",
            "set data.format=text to read it as plain text",
        )
    yield from wikitext.documents(str(file), parts, clean=options.wikitext == "clean")


def _begun(parts: Iterator[tuple[str, int]]) -> tuple[str, Iterator[tuple[str, int]]]:
    """The first part that is more than space, and all parts."""
    seen: list[tuple[str, int]] = []
    for part in parts:
        seen.append(part)
        if part[0].strip():
            break
    return (seen[-1][0] if seen else ""), chain(seen, parts)


def _text_format(options: ReadOptions, start: str) -> str:
    if options.format != "auto":
        return options.format
    return "wikitext" if wikitext.is_wikitext(start) else "text"
