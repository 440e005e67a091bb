"""Rows of one JSON list of objects, read piece by piece: memory does not grow with the file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mule.data.sources.encoding import decoded_parts
from mule.data.sources.json_text import DECODER, LENIENT_DECODER, broken_json, row_of
from mule.data.sources.row import MAX_ROW_BYTES, Row
from mule.errors import DataError

# An error this near to the end of what was read may come from a cut token (the longest is a pair
# of escapes, \ud83d\ude00); one further in front is an error whatever follows.
_TOKEN_CHARS = 32
_SPACE = re.compile(r"[ \t\r\n]*")


def scan(file: Path, stream: io.BufferedReader, line: int) -> Iterator[Row | DataError]:
    """The rows of the list whose [ comes next, at `line`. Raises DataError if it cannot go on."""
    window = _Window(decoded_parts(file, stream, line), line)
    window.next_char()
    window.step(1)
    if window.next_char() == "]":
        raise DataError(file, None, "no rows: the list is empty", "put data in it")
    while True:
        yield _element(file, window)
        following = window.next_char()
        if following != ",":
            break
        window.step(1)
    _check_end(file, window)


class _Window:
    """The part of the text that is in memory; `line` is the line of `position`."""

    def __init__(self, parts: Iterator[tuple[str, int]], line: int) -> None:
        self.text, self.position, self.line = "", 0, line
        self._parts = parts

    def next_char(self) -> str:
        """The next character that is no space, now at `position`; "" at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self.position)
            self.step(len(space[0]) if space else 0)
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def step(self, num_chars: int) -> None:
        end = self.position + num_chars
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def grow(self) -> bool:
        """Read as much again as is held; False at the end of the file."""
        held = [self.text[self.position :]]
        num_chars, wanted = 0, len(held[0])
        while part := next(self._parts, None):
            held.append(part[0])
            num_chars += len(part[0])
            if num_chars >= wanted:
                break
        self.text, self.position = "".join(held), 0
        return num_chars > 0


def _element(file: Path, window: _Window) -> Row | DataError:
    """The object at the position, which moves behind it."""
    window.next_char()
    while True:
        try:
            value, end = DECODER.raw_decode(window.text, window.position)
        except json.JSONDecodeError as error:
            if _may_be_cut(error, window) and _grow_to_limit(file, window):
                continue
            raise _broken(file, window, error) from None
        except (ValueError, RecursionError) as error:
            return _step_over(file, window, error)
        line = window.line
        window.step(end - window.position)
        return _row_or_error(file, line, value)


def _row_or_error(file: Path, line: int, value: Any) -> Row | DataError:
    try:
        return row_of(file, line, value)
    except DataError as error:
        return error


def _may_be_cut(error: json.JSONDecodeError, window: _Window) -> bool:
    return error.pos >= len(window.text) - _TOKEN_CHARS or error.msg.startswith("Unterminated")


def _grow_to_limit(file: Path, window: _Window) -> bool:
    if len(window.text) - window.position > MAX_ROW_BYTES:
        raise DataError(
            file,
            window.line,
            f"the row that begins here is longer than {MAX_ROW_BYTES // 10**6} MB",
            "split it, or look for a quote or bracket that is never closed",
        )
    return window.grow()


def _broken(file: Path, window: _Window, error: json.JSONDecodeError) -> DataError:
    is_cut = error.pos >= len(window.text.rstrip()) or error.msg.startswith("Unterminated")
    line = window.line + window.text.count("\n", window.position, error.pos)
    near = window.text[max(0, error.pos - 10) : error.pos + 10]
    return broken_json(file, line, error, f"near {near!r}", is_cut)


def _step_over(file: Path, window: _Window, error: ValueError | RecursionError) -> DataError:
    """The error of a row with NaN or a key twice, the position behind it."""
    problem = broken_json(file, window.line, error, "")
    while True:
        try:
            _, end = LENIENT_DECODER.raw_decode(window.text, window.position)
        except json.JSONDecodeError as lenient_error:
            if _may_be_cut(lenient_error, window) and _grow_to_limit(file, window):
                continue
            raise problem from None
        except (ValueError, RecursionError):
            raise problem from None
        window.step(end - window.position)
        return problem


def _check_end(file: Path, window: _Window) -> None:
    following = window.next_char()
    if following == "]":
        window.step(1)
        following = window.next_char()
        if not following:
            return
        message = "the list ends, but more follows: {found!r}"
    else:
        message = "expected , or ] but found {found!r}"
    if not following:
        raise DataError(
            file, window.line, "the list is cut off: no ] at the end", "copy the file again"
        )
    found = window.text[window.position : window.position + 20]
    raise DataError(file, window.line, message.format(found=found), "correct the JSON at this line")
