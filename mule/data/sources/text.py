"""Plain text: a file is a document, or several with <|endoftext|> alone on a line between.

A long document comes in pieces, so that memory stays bounded: every piece but the last has
ends=False, and the next begins at a single space between two words, where a cut changes no token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mule.data.sources.format import Format
from mule.data.sources.items import Document

SUFFIXES = (".txt", ".md", ".tokens")
MAX_CHARS: int = 16_000_000
_END_LINE = re.compile(r"^[^\S\n]*<\|endoftext\|>[^\S\n]*(?:\n|\Z)", re.MULTILINE)
_CUT = re.compile(r"(?<=\S) (?=\S)")
_LINE_CUT = re.compile(r"(?<=\n)(?=\S)")  # for a text without a space between words, far and wide


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document, or all of it; `is_bounded`: a boundary was met before or behind it."""

    text: str
    line: int
    begins: bool
    ends: bool
    is_bounded: bool


def documents(file: str, parts: Iterable[tuple[str, int]]) -> Iterator[Document]:
    """The documents in `parts`; empty lines around a <|endoftext|> belong to none."""
    for piece in split(parts, _END_LINE):
        text, line = piece.text, piece.line
        if piece.begins and piece.is_bounded:
            text = text.lstrip("\n")
            line += len(piece.text) - len(text)
        if piece.ends and piece.is_bounded:
            text = text.rstrip("\n")
        yield Document(text, file, line, piece.ends)


def split(parts: Iterable[tuple[str, int]], boundary: re.Pattern[str]) -> Iterator[Piece]:
    """Documents between the matches of `boundary`, which begins at the start of a line.

    What it matches is in none of them; a lookahead matches nothing. Documents of space are left
    out.
    """
    buffer, line, searched = "", 1, 0
    begins, is_bounded = True, False
    for part, _ in parts:
        buffer += part
        while match := boundary.search(buffer, searched):
            is_bounded = True
            text = buffer[: match.start()]
            if text.strip() or not begins:
                yield Piece(text, line, begins, True, is_bounded)
            line += buffer.count("\n", 0, match.end())
            buffer, begins = buffer[match.end() :], True
            searched = int(match.start() == match.end())
        while cut := _long_cut(buffer):
            yield Piece(buffer[:cut], line, begins, False, is_bounded)
            line += buffer.count("\n", 0, cut)
            buffer, begins = buffer[cut:], False
            searched = 1  # it does not begin with a line
        searched = max(searched, buffer.rfind("\n") + 1)
    if buffer.strip() or not begins:
        yield Piece(buffer, line, begins, True, is_bounded)


def _long_cut(buffer: str) -> int | None:
    """Where to cut a buffer of more than MAX_CHARS, if anywhere."""
    if len(buffer) <= MAX_CHARS:
        return None
    found = _CUT.search(buffer, MAX_CHARS)
    if found is None and len(buffer) > 4 * MAX_CHARS:
        found = _LINE_CUT.search(buffer, MAX_CHARS)
    return found.start() if found else None


FORMAT = Format(
    "text",
    "document",
    "text files: each is a document, or several with <|endoftext|> on a line between",
)
