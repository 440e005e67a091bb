"""Rows of CSV and TSV: the first line names the columns, every value is a string or None."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from mule.data.sources.encoding import check_start, decode_line
from mule.data.sources.files import OnBytes, data_suffix, open_unpacked
from mule.data.sources.row import MAX_ROW_BYTES, Row
from mule.errors import DataError

_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_MAX_NAME_CHARS = 200


def scan(file: Path, on_bytes: OnBytes | None = None) -> Iterator[Row | DataError]:
    """Every row, and a DataError in place of a bad one. Raises DataError where it cannot go on."""
    csv.field_size_limit(MAX_ROW_BYTES)  # the module's own limit of 131,072 is too low for a text
    is_empty = True
    with open_unpacked(file, on_bytes) as stream:
        check_start(file, stream)
        source = _Lines(file, stream)
        delimiter = _delimiter(file, source)
        reader = _records(file, source, delimiter)
        names = _header(file, next(reader, None), delimiter)
        for record in reader:
            is_empty = False
            if isinstance(record, DataError):
                yield record
                continue
            line, cells = record
            yield _row(file, line, names, cells)
    if is_empty:
        raise DataError(
            file, None, "no rows: the file has only a header", "put data in it, or leave it out"
        )


class _Lines:
    """The lines of the file for csv.reader; remembers those of the record being read."""

    def __init__(self, file: Path, stream: io.BufferedReader) -> None:
        self._file, self._stream = file, stream
        self.line = 0  # of the line given last
        self.record = bytearray()
        self.num_lines = 0  # of the record
        self._waiting: bytes | None = None

    def begin_record(self) -> None:
        self.record, self.num_lines = bytearray(), 0

    def peek(self) -> str:
        """The first line that is not blank, which is still to come; "" without any."""
        while (text := next(self, "")).isspace():
            self.begin_record()
        self._waiting = bytes(self.record) or None
        return text

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        content, self._waiting = self._waiting, None
        if content is None:
            content = self._stream.readline(MAX_ROW_BYTES + 1)
            if not content:
                raise StopIteration
            self.line += 1
        text = decode_line(self._file, content, self.line)
        self.record += content
        self.num_lines += 1
        if len(self.record) > MAX_ROW_BYTES:
            self._fail_too_long()
        return text

    def _fail_too_long(self) -> NoReturn:
        raise DataError(
            self._file,
            self.line - self.num_lines + 1,
            f"the row that begins here is longer than {MAX_ROW_BYTES // 10**6} MB",
            "look for a quote that is never closed, or split the row",
        )


# ---------------------------------------------------------------- header


def _delimiter(file: Path, source: _Lines) -> str:
    """What separates the columns, by the suffix and the first line. Raises DataError."""
    header = source.peek()
    if not header:
        raise DataError(file, None, "the file is empty", "put data in it, or leave it out")
    expected = "\t" if data_suffix(file) == ".tsv" else ","
    used = [mark for mark in _NAMES if _num_cells(header, mark) > 1]
    if not used or used == [expected]:
        return expected
    if expected == "," and len(used) == 1:
        return used[0]
    if expected == "\t" and "\t" in used:
        return expected
    found = " and ".join(_NAMES[mark] for mark in used)
    name = shlex.quote(file.name)
    if expected == "\t":
        raise DataError(
            file,
            source.line,
            f"the header has no tab but {found}",
            f"mv {name} {shlex.quote(file.stem + '.csv')}",
        )
    raise DataError(
        file,
        source.line,
        f"the header has {found}: which of them separates the columns?",
        "put names that hold one of them in quotes, or separate by tabs and call the file .tsv",
    )


def _num_cells(header: str, mark: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=mark), []))
    except csv.Error:
        return 1


def _header(
    file: Path, record: tuple[int, list[str]] | DataError | None, delimiter: str
) -> list[str]:
    """The names of the columns. Raises DataError."""
    assert record is not None  # _delimiter saw a line
    if isinstance(record, DataError):
        raise record
    line, names = record
    names = [name.strip() for name in names]
    numbered = list(enumerate(names, start=1))
    twice = [name for name in names if names.count(name) > 1 and name]
    unnamed = [number for number, name in numbered if not name]
    if twice:
        message, hint = f'two columns are called "{twice[0]}"', "rename one of them"
    elif unnamed:
        message = f"column {unnamed[0]} has no name in the header"
        hint = 'give it one, such as "id" (pandas leaves it out with to_csv(index=False))'
    elif _is_data(names):
        message = "the first line must name the columns, but it looks like a row"
        hint = f"add a first line such as {delimiter.join(['prompt', 'completion'])}"
    else:
        return names
    raise DataError(file, line, message, hint)


def _is_data(names: list[str]) -> bool:
    if any(len(name) > _MAX_NAME_CHARS or "\n" in name for name in names):
        return True
    return all(name.replace(".", "").replace("-", "").isdigit() for name in names)


# ---------------------------------------------------------------- records


def _records(
    file: Path, source: _Lines, delimiter: str
) -> Iterator[tuple[int, list[str]] | DataError]:
    """(first line, cells) of each record. Raises DataError where it cannot go on."""
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        source.begin_record()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = _broken(file, source, delimiter, error)
            if source.num_lines > 1:
                raise problem from None  # where the next record begins, nobody can know
            yield problem
            continue
        except DataError as error:  # bytes that are no text
            if source.record:
                raise
            yield error
            continue
        if cells:  # a blank line has none
            yield source.line - source.num_lines + 1, cells


def _row(file: Path, line: int, names: list[str], cells: list[str]) -> Row | DataError:
    if len(cells) == len(names):
        value = {name: cell or None for name, cell in zip(names, cells)}
        return Row(value, str(file), line)
    more = len(cells) > len(names)
    return DataError(
        file,
        line,
        f"the row has {len(cells)} cells, the header {len(names)} names",
        "put the text that holds a separator or a line end in double quotes"
        if more
        else "add the missing cells; an empty one is nothing between two separators",
    )


def _broken(file: Path, source: _Lines, delimiter: str, error: csv.Error) -> DataError:
    """What csv.reader could not read, with the line where a quote opened."""
    first = source.line - source.num_lines + 1
    reason = str(error)
    if "new-line character" in reason:
        hint = f"tr '\\r' '\\n' < {shlex.quote(file.name)} > {shlex.quote('new-' + file.name)}"
        return DataError(file, first, "a line end that is a single CR (0x0d)", hint)
    if "field limit" in reason:
        reason = f"a cell of more than {MAX_ROW_BYTES // 10**6} MB"
    opened = first + _quote_line(source.record.decode(), delimiter)
    if "unexpected end of data" in reason:
        return DataError(
            file,
            opened,
            "a quote opens here and is never closed",
            'close it, and write each " inside a quoted text as ""',
        )
    return DataError(
        file,
        opened,
        f"broken quotes in the row that begins at line {first} ({reason})",
        'write each " inside a quoted text as ""',
    )


def _quote_line(record: str, delimiter: str) -> int:
    """How many lines into the record the quoted cell begins that was read last."""
    line, is_quoted, last, before = 0, False, 0, delimiter
    for char in record:
        if char == '"' and is_quoted:
            is_quoted = False
        elif char == '"' and before in (delimiter, "\n"):
            is_quoted, last = True, line
        elif char == '"' and before == '"':
            is_quoted = True  # two quotes inside a quoted cell stand for one
        line += char == "\n"
        before = char
    return last
