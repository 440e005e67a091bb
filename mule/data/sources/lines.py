"""Rows of JSON: one object a line, or one list of objects; which of them, the content says."""

from __future__ import annotations

import io
import itertools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from mule.data.sources import array
from mule.data.sources.encoding import check_start, decode_line
from mule.data.sources.files import OnBytes, compression, open_unpacked
from mule.data.sources.json_text import DECODER, broken_json, row_of
from mule.data.sources.row import MAX_ROW_BYTES, Row
from mule.errors import DataError

_PEEK_BYTES = 1 << 16  # enough of what follows a line to see whether it goes on


def scan(file: Path, on_bytes: OnBytes | None = None) -> Iterator[Row | DataError]:
    """Every row, and a DataError in place of a bad one. Raises DataError where it cannot go on."""
    with open_unpacked(file, on_bytes) as stream:
        check_start(file, stream)
        line = _skip_space(stream)
        start = stream.peek(1)[:1]
        if not start:
            raise DataError(file, None, "the file is empty", "put data in it, or leave it out")
        if start == b"[":
            yield from array.scan(file, stream, line)
            return
        lines = _lines(file, stream, line)
        first = next(lines)
        _refuse_spread_object(file, stream, *first)
        for line, content in itertools.chain([first], lines):
            yield _parsed(file, line, content)


def _skip_space(stream: io.BufferedReader) -> int:
    """Step over leading space; the number of the line behind it."""
    line = 1
    while held := stream.peek():
        space = held[: len(held) - len(held.lstrip())]
        line += space.count(b"\n")
        stream.read(len(space))
        if len(space) < len(held):
            break
    return line


def _lines(file: Path, stream: io.BufferedReader, first: int) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the lines that are not blank; one too long ends in a DataError."""
    numbers = itertools.count(first)
    while content := stream.readline(MAX_ROW_BYTES + 1):
        number = next(numbers)
        if len(content) > MAX_ROW_BYTES and not content.endswith(b"\n"):
            _fail_too_long(file, number)
        if not content.isspace():
            yield number, content


def _parsed(file: Path, line: int, content: bytes) -> Row | DataError:
    try:
        return row_of(file, line, DECODER.decode(decode_line(file, content.rstrip(), line)))
    except (ValueError, RecursionError) as error:
        column = error.colno if isinstance(error, json.JSONDecodeError) else 0
        return broken_json(file, line, error, f"column {column}", not content.endswith(b"\n"))
    except DataError as error:
        return error


def _fail_too_long(file: Path, line: int) -> NoReturn:
    raise DataError(
        file,
        line,
        f"the row is longer than {MAX_ROW_BYTES // 10**6} MB",
        "give every row a line of its own; if one object holds all rows under a key: "
        f"jq -c '.KEY[]' {shlex.quote(file.name)} > rows.jsonl",
    )


# ---------------------------------------------------------------- one object over many lines


def _refuse_spread_object(file: Path, stream: io.BufferedReader, line: int, content: bytes) -> None:
    """DataError when the first row goes on after its line: the file is one written-out object."""
    if not content.lstrip().startswith(b"{"):
        return
    first = decode_line(file, content, line)
    if not _is_cut(first):
        return
    # Cut at a line end: whole lines cannot be cut inside a character.
    following = stream.peek(_PEEK_BYTES).rpartition(b"\n")[0]
    if not following.strip():
        following = stream.peek(_PEEK_BYTES)
    text = first + following.decode(errors="replace")
    if following.strip() and (_is_cut(text) or _is_object(text)):
        message, hint = _advice(file, first, stream)
        raise DataError(file, line, message, hint)


def _is_cut(text: str) -> bool:
    """Whether `text` is the beginning of a JSON value, as far as it goes."""
    try:
        DECODER.decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


def _is_object(text: str) -> bool:
    try:
        DECODER.raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return True


def _advice(file: Path, first: str, stream: io.BufferedReader) -> tuple[str, str]:
    """What to say of an object over many lines, by what it holds."""
    name = shlex.quote(file.name)
    tool = {"": "", ".gz": f"gunzip -c {name} | ", ".zst": f"zstd -dc {name} | "}[compression(file)]
    name = "" if tool else f" {name}"
    one_row = f"{tool}jq -c .{name} > rows.jsonl"
    what = "a JSON object over several lines, where every row needs a line of its own"
    try:
        rest = stream.read(MAX_ROW_BYTES).decode()
        value = DECODER.decode(first + rest)
    except (ValueError, RecursionError):
        return what, f"write each object on one line: {one_row}"
    lists = [
        key
        for key, inside in value.items()
        if isinstance(inside, list) and inside and all(isinstance(row, dict) for row in inside)
    ]
    if not lists:
        return what, f"write the object on one line: {one_row}"
    held = " and ".join(f'"{key}" ({len(value[key]):,})' for key in lists)
    rows = "; or ".join(f"{tool}jq -c '.[\"{key}\"][]'{name} > rows.jsonl" for key in lists)
    return (
        f"one JSON object over several lines; it holds lists of objects under {held}",
        f"if those are the rows: {rows}; if the object is one row: {one_row}",
    )
