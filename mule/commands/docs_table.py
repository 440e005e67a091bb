"""Tables of the generated pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, num_words: int = 100) -> str:
    """A Markdown table; behind the first `num_words` columns come numbers, set to the right."""
    rule = ["---" if place < num_words else "--:" for place in range(len(columns))]
    lines = (columns, rule, *rows)
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
