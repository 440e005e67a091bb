"""Documents as rows: {"text": "..."}."""

from __future__ import annotations

from mule.data.sources.rows import Document, Row

KEYS = ("text",)


def parse(row: Row) -> Document:
    text = row.text("text")
    if not text.strip():
        row.fail('"text" is empty', "remove the row")
    return Document(text, row.file, row.line)
