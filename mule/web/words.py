"""Values as the pages show them; the same words as the terminal's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from mule.commands.preview_text import visible
from mule.figures import date, duration, figure, in_bytes, short
from mule.web.ids import id_of

_ADDRESS = re.compile(r"https?://[^\s<>\"'`]+[^\s<>\"'`.,;:)\]]")


def linked(text: str) -> list[tuple[str, bool]]:
    """The text cut at web addresses: (part, whether it is one)."""
    parts, place = [], 0
    for match in _ADDRESS.finditer(text):
        parts += [(text[place : match.start()], False), (match[0], True)]
        place = match.end()
    return [part for part in [*parts, (text[place:], False)] if part[0]]


def runs_of(rows: Iterable[dict[str, Any]], key: str) -> list[tuple[bool, list[dict[str, Any]]]]:
    """Neighbours alike in `key`: (whether it is set, the rows)."""
    return [(is_set, list(own)) for is_set, own in groupby(rows, lambda row: bool(row.get(key)))]


FILTERS: dict[str, Callable[..., Any]] = {
    "date": date,
    "duration": duration,
    "figure": lambda value, name: figure(name, value),  # {{ row.val_loss | figure("val_loss") }}
    "in_bytes": in_bytes,
    "id_of": id_of,
    "linked": linked,
    "runs_of": runs_of,
    "short": short,
    "visible": lambda text: visible(str(text)),
}
