"""How many examples files hold, counted by their lines: nothing is parsed but JSON arrays."""

from __future__ import annotations

import json
from pathlib import Path

from mule.config.schema import TEXT_FORMATS, DataSection
from mule.data.sources.paths import expand
from mule.errors import MuleError

_MAX_BYTES = 2**28  # of an array that is parsed, or lines that are counted: a second or two
_LINES, _ARRAY = (".jsonl", ".ndjson"), ".json"


def examples_in(data: DataSection) -> tuple[int, str] | None:
    """Examples of data.train before any is held out, and what was counted; None where unknown.

    Of documents, of files that are not here, and of those that only the reader understands.
    """
    if data.format in (*TEXT_FORMATS, "text_rows") or not data.train:
        return None
    try:
        files = expand(data.train)
    except MuleError:  # not here, or on the hub
        return None
    if sum(file.stat().st_size for file in files) > _MAX_BYTES:
        return None
    counts = [_count(file) for file in files]
    if not counts or None in counts:
        return None
    return sum(count or 0 for count in counts), ", ".join(str(file) for file in files)


def _count(file: Path) -> int | None:
    """Rows of a file of JSON lines or of one JSON array."""
    if file.suffix in _LINES:
        with file.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    if file.suffix != _ARRAY:
        return None
    text = file.read_bytes()
    if not text.lstrip()[:1] == b"[":
        return sum(1 for line in text.splitlines() if line.strip())
    try:
        found = json.loads(text)
    except ValueError:  # not an array after all: reading the data will say where
        return None
    return len(found)
