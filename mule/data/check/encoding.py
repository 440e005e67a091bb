"""Text that was decoded with the wrong encoding and saved again: `√©` or `Ã©` where é was meant."""

from __future__ import annotations

import re
from typing import Any

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
# A closing quote is E2 80 9D; Windows-1252 has no 9D, so many programs lost that third character.
# ftfy would take the blank that follows for it and write a dagger.
_LOST_CLOSING_QUOTE = re.compile("â€(?=[ \t]|$)")


def repair_text(text: str) -> str:
    """`text` with its double-encoded lines repaired; every other line as it is."""
    if text.isascii():
        return text
    return "\n".join(_repair_line(line) for line in text.split("\n"))


def repair_value(value: Any) -> Any:
    """A JSON value with every string in it repaired, keys left alone."""
    if isinstance(value, str):
        return repair_text(value)
    if isinstance(value, list):
        return [repair_value(item) for item in value]
    if isinstance(value, dict):
        return {key: repair_value(item) for key, item in value.items()}
    return value


def first_repair(text: str) -> tuple[int, str] | None:
    """(position, `found -> meant`) of the first double-encoded line of `text`."""
    if text.isascii():
        return None
    position = 0
    for line in text.split("\n"):
        if (repaired := _repair_line(line)) != line:
            return position, _difference(line, repaired)
        position += len(line) + 1
    return None


def _repair_line(line: str) -> str:
    if line.isascii():
        return line
    import ftfy
    from ftfy.badness import is_bad

    if not is_bad(line):
        return line
    return ftfy.fix_encoding(_LOST_CLOSING_QUOTE.sub("â€\x9d", line))


def _difference(found: str, meant: str) -> str:
    """The words around the first character that differs, before and after."""
    pairs = zip(found, meant, strict=False)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(found), len(meant)))
    start = found.rfind(" ", 0, place) + 1
    return f"{_words(found[start:])} -> {_words(meant[start:])}"


def _words(text: str) -> str:
    return " ".join(text[:40].split(" ")[:2])
