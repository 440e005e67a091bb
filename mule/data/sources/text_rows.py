"""Documents as rows: {"text": "..."}, as C4 and FineWeb have them."""

from __future__ import annotations

from mule.data.sources.format import Format
from mule.data.sources.items import Document
from mule.data.sources.row import Row


def _parse(row: Row) -> Document:
    text = row.text("text")
    if not text.strip():
        row.fail('"text" is empty', "remove the row")
    return Document(text, row.file, row.line)


FORMAT = Format(
    "text_rows",
    "document",
    "one document a row, as C4, FineWeb and mlx-lm write them",
    keys=(("text",),),
    parse=_parse,
)
