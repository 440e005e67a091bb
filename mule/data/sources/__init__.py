"""Data files in the formats people have, read as documents or conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mule.data.sources import alpaca, gsm8k, messages, text, text_rows
from mule.data.sources.paths import SUFFIXES, expand, split_files
from mule.data.sources.rows import Conversation, Document, Message, Row, read_rows
from mule.errors import DataError

__all__ = [
    "FORMATS",
    "Conversation",
    "Document",
    "Message",
    "Row",
    "detect",
    "expand",
    "read",
    "read_file",
    "split_files",
]

_ROW_FORMATS = {
    "messages": messages,
    "alpaca": alpaca,
    "gsm8k": gsm8k,
    "text_rows": text_rows,
}
FORMATS = ("text", *_ROW_FORMATS)


def read(paths: Sequence[str | Path], format: str = "auto") -> Iterator[Document | Conversation]:
    """Everything in `paths` (files, folders, patterns), in order. Raises DataError."""
    for file in expand(paths):
        yield from read_file(file, format)


def read_file(file: Path, format: str = "auto") -> Iterator[Document | Conversation]:
    """The documents or conversations of one file. Raises DataError with the line."""
    name = detect(file) if format == "auto" else format
    try:
        if name == "text":
            yield from text.read(file)
        else:
            yield from map(_parser(file, name), read_rows(file))
    except PermissionError:
        raise DataError(file, None, "permission denied", f"chmod u+r {file}") from None


def detect(path: str | Path) -> str:
    """The format of a file, by its suffix and the keys of its first row."""
    file = Path(path)
    if file.suffix in text.SUFFIXES:
        return "text"
    if file.suffix not in SUFFIXES:
        raise DataError(
            file,
            None,
            f"unknown kind of file {file.suffix!r}",
            f"rename it to one of {', '.join(SUFFIXES)}, or set data.format",
        )
    row = next(iter(read_rows(file)))
    for name, module in _ROW_FORMATS.items():
        if all(key in row.value for key in module.KEYS):
            return name
    known = "; ".join(f"{name}: {', '.join(m.KEYS)}" for name, m in _ROW_FORMATS.items())
    row.fail(
        f"no known format has the keys {', '.join(row.value) or '(none)'}",
        f"rename the keys to those of a format ({known})",
    )


def _parser(file: Path, name: str) -> Callable[[Row], Document | Conversation]:
    if name not in _ROW_FORMATS:
        raise DataError(
            file, None, f"unknown format {name!r}", f"use auto or one of {', '.join(FORMATS)}"
        )
    return _ROW_FORMATS[name].parse
