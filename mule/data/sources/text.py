"""Plain text: a file is a document, or several with <|endoftext|> alone on a line between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mule.data.sources.rows import Document, read_text

SUFFIXES = (".txt", ".md")
_SEPARATOR = "<|endoftext|>"


def read(file: Path) -> Iterator[Document]:
    """The documents of `file`. Raises DataError when there are none."""
    text = read_text(file)
    if _SEPARATOR not in text:
        yield Document(text, str(file), 1)
        return
    lines: list[str] = []
    start = 1
    for number, line in enumerate([*text.split("\n"), _SEPARATOR], start=1):
        if line.strip() != _SEPARATOR:
            lines.append(line)
            continue
        if document := "\n".join(lines).strip("\n"):
            yield Document(document, str(file), start)
        lines, start = [], number + 1
