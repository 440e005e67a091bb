"""Rows of JSON lines, a JSON array or Parquet, each with its place; and what rows become."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mule.data.sources.items import ROLES, Conversation, Document, Message
from mule.errors import DataError

__all__ = [
    "ROLES",
    "Conversation",
    "Document",
    "Message",
    "Row",
    "read_rows",
    "read_text",
    "type_name",
]
_PARQUET_BATCH_ROWS = 1024
_TYPE_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a data file; `line` is its row number in Parquet."""

    value: dict[str, Any]
    file: str
    line: int

    def fail(self, message: str, hint: str = "") -> NoReturn:
        raise DataError(self.file, self.line, message, hint)

    def text(self, key: str) -> str:
        """The string under `key`; DataError when it is missing, no string, or not writable."""
        if key not in self.value:
            found = ", ".join(self.value) or "nothing"
            self.fail(f'no "{key}" in this row (found: {found})', f'add "{key}" to the row')
        return self.checked_text(self.value[key], f'"{key}"')

    def checked_text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            self.fail(f"{name} is {type_name(value)}, not a string", "put the text in quotes")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fail(
                f"{name} holds \\u{ord(value[error.start]):04x}, half of a character",
                "remove it, or write the whole character",
            )
        return value

    def conversation(self, *messages: Message) -> Conversation:
        """A checked conversation. Raises DataError when the turns are not in order."""
        turns = messages[1:] if messages[0].role == "system" else messages
        for number, message in enumerate(turns):
            expected = ("user", "assistant")[number % 2]
            if message.role != expected:
                self.fail(
                    f"message {len(messages) - len(turns) + number + 1} is from {message.role} "
                    f"where {expected} must speak",
                    "after an optional first system message, user and assistant take turns",
                )
            if message.role == "assistant" and not message.content.strip():
                self.fail("an assistant message is empty", "write the answer, or remove the row")
        if len(turns) < 2:
            self.fail("no assistant message, so nothing to learn", "add the answer")
        return Conversation(messages, self.file, self.line)


def type_name(value: Any) -> str:
    """What a JSON value is called in a message."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def read_text(file: Path) -> str:
    """The content of a UTF-8 file, without byte-order mark and with LF line ends."""
    content = file.read_bytes()
    _refuse_other_encodings(file, content[:4])
    text = _decode(file, content, first_line=1)
    if not text.strip():
        raise DataError(file, None, "the file is empty", "put data in it, or leave it out")
    return text.replace("\r\n", "\n")


def read_rows(file: Path) -> Iterator[Row]:
    """Every object in a .jsonl, .json or .parquet file. Raises DataError with the line."""
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    with open(file, "rb") as opened:
        start = opened.read(4096)
    _refuse_other_encodings(file, start[:4])
    if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _array_rows(file, read_text(file))
    else:
        yield from _line_rows(file)


# ---------------------------------------------------------------- JSON


def _line_rows(file: Path) -> Iterator[Row]:
    found = False
    with open(file, "rb") as opened:
        for line, content in enumerate(opened, start=1):
            text = _decode(file, content, first_line=line).strip()
            if not text:
                continue
            found = True
            try:
                value = _DECODER.decode(text)
            except json.JSONDecodeError as error:
                _fail_broken_json(file, line, error, not content.endswith(b"\n"))
            except (ValueError, RecursionError) as error:
                _fail_unusual_json(file, line, error)
            yield _row(file, line, value)
    if not found:
        raise DataError(file, None, "the file is empty", "put data in it, or leave it out")


def _array_rows(file: Path, text: str) -> Iterator[Row]:
    position = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    if text.startswith("]", position):
        raise DataError(file, None, "no rows: the list is empty", "put data in it")
    while True:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            is_cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
            _fail_broken_json(file, error.lineno, error, is_cut)
        except (ValueError, RecursionError) as error:
            _fail_unusual_json(file, line, error)
        yield _row(file, line, value)
        position = _skip_space(text, end)
        if not text.startswith(",", position):
            break
        position = _skip_space(text, position + 1)
    _check_array_end(file, text, position)


def _check_array_end(file: Path, text: str, position: int) -> None:
    rest = text[position:].strip()
    if rest == "]":
        return
    line = text.count("\n", 0, position) + 1
    if not rest:
        raise DataError(file, line, "the list is cut off: no ] at the end", "copy the file again")
    raise DataError(
        file, line, f"expected , or ] but found {rest[:20]!r}", "correct the JSON at this line"
    )


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _row(file: Path, line: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            file,
            line,
            f"the row is {'a string' if isinstance(value, str) else type_name(value)}, "
            "not an object",
            'every row must look like {"messages": [...]} or {"text": "..."}',
        )
    return Row(value, str(file), line)


def _fail_broken_json(file: Path, line: int, error: json.JSONDecodeError, is_cut: bool) -> NoReturn:
    if is_cut:
        raise DataError(
            file,
            line,
            f"broken JSON: the file is cut off here ({error.msg}, column {error.colno})",
            "copy the file again, or remove this line",
        ) from None
    raise DataError(
        file,
        line,
        f"broken JSON: {error.msg} (column {error.colno})",
        "one complete JSON object a line, or one JSON list of objects",
    ) from None


def _fail_unusual_json(file: Path, line: int, error: Exception) -> NoReturn:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise DataError(file, line, f"broken JSON: {reason}", "correct this row") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" stands there twice')
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


# ---------------------------------------------------------------- Parquet


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, str(file), number)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            file, None, f"cut off or not Parquet ({reason})", "copy the file again"
        ) from None
    if number == 0:
        raise DataError(file, None, "no rows in this file", "put data in it, or leave it out")


# ---------------------------------------------------------------- bytes


def _decode(file: Path, content: bytes, first_line: int) -> str:
    try:
        text = content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        start = error.start + (3 if first_line == 1 and content[:3] == codecs.BOM_UTF8 else 0)
        line = first_line + content.count(b"\n", 0, start)
        raise DataError(
            file,
            line,
            f"invalid UTF-8 (byte 0x{content[start]:02x})",
            f"if it is Latin-1: iconv -f LATIN1 -t UTF-8 {file.name} > new-{file.name}",
        ) from None
    if "\x00" in text:
        line = first_line + text.count("\n", 0, text.index("\x00"))
        raise DataError(file, line, "a NUL byte: this is not a text file", "leave this file out")
    return text


def _refuse_other_encodings(file: Path, start: bytes) -> None:
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if start.startswith(marks) or b"\x00" in start[:2]:
        raise DataError(
            file,
            None,
            "the file is UTF-16, not UTF-8",
            f"iconv -f UTF-16 -t UTF-8 {file.name} > new-{file.name}",
        )
