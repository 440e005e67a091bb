"""Data files in the formats people have, read as documents, conversations or preferences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mule import progress
from mule.data.sources.detect import FORMATS
from mule.data.sources.files import OnBytes
from mule.data.sources.format import Format
from mule.data.sources.items import (
    Conversation,
    Document,
    Item,
    Message,
    Notice,
    Preference,
    ToolCall,
)
from mule.data.sources.options import ReadOptions
from mule.data.sources.paths import expand, split_files
from mule.data.sources.reading import format_of, items_of
from mule.data.sources.row import Row
from mule.errors import DataError

__all__ = [
    "AS_FOUND",
    "CHAT_FORMATS",
    "FORMATS",
    "PREFERENCE_FORMATS",
    "Conversation",
    "Document",
    "Format",
    "Item",
    "Message",
    "Notice",
    "Preference",
    "ReadOptions",
    "Row",
    "ToolCall",
    "detect",
    "expand",
    "read",
    "read_file",
    "scan",
    "split_files",
]

AS_FOUND = ReadOptions()
CHAT_FORMATS = tuple(name for name, known in FORMATS.items() if known.kind == "conversation")
PREFERENCE_FORMATS = tuple(name for name, known in FORMATS.items() if known.kind == "preference")


def read(
    paths: Sequence[str | Path],
    options: ReadOptions = AS_FOUND,
    on_bytes: OnBytes | None = None,
) -> Iterator[Document | Conversation]:
    """What can be trained on in `paths` (files, folders, patterns), in order.

    Raises DataError at the first problem, and for files that are not to be trained on.
    """
    for file in expand(paths):
        yield from read_file(file, options, on_bytes)


def read_file(
    file: Path, options: ReadOptions = AS_FOUND, on_bytes: OnBytes | None = None
) -> Iterator[Document | Conversation]:
    """The documents or conversations of one file, for training. Raises DataError."""
    for found in items_of(file, options, on_bytes, training=True):
        if isinstance(found, DataError):
            raise found
        if isinstance(found, Document | Conversation):
            yield found
        elif isinstance(found, Notice) and found.lost:
            progress.note(str(found), "warning")


def scan(
    file: Path, options: ReadOptions = AS_FOUND, on_bytes: OnBytes | None = None
) -> Iterator[Item | DataError | Notice]:
    """Everything in one file for a check: problems and notices come as values between the items.

    Reading goes on after a problem of a row; rows of several formats are all read, and told last.
    Raises UserError only for options that do not exist.
    """
    yield from items_of(file, options, on_bytes, training=False)


def detect(file: str | Path, options: ReadOptions = AS_FOUND, max_rows: int | None = None) -> str:
    """The format of a file by all its rows, or the first `max_rows`. Raises DataError."""
    return format_of(Path(file), options, max_rows)
