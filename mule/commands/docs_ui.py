"""The generated part of docs/ui.md: how fast the pages are, as bench/ui.py measured it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule import fsio
from mule.commands.docs_table import table
from mule.figures import in_bytes

PAGE, BLOCK = "ui.md", "speed"
_NOTHING_YET = "Not measured yet: `python -m bench.ui run`.\n"


def speed_markdown(results: Path) -> str:
    """A row for each figure, and on what it was measured."""
    file = results / "ui.json"
    if not file.is_file():
        return _NOTHING_YET
    found = fsio.read_json(file)
    rows = [(what, f"**{value}**") for what, value in _figures(found)]
    machine, points = found["machine"], found["points"]
    return (
        f"{table(('what', 'measured'), rows, num_words=1)}\n"
        f"{machine['cpu']}, {machine['cores']} cores without a GPU, which also run the browser "
        f"({found['browser']}); the run has {points:,} updates; medians of {found['rounds']} "
        f"rounds; {found['date']}, `{found['command']}`.\n"
    )


def _figures(found: dict[str, Any]) -> list[tuple[str, str]]:
    opening, run, server = found["opening"], found["run"], found["server"]
    return [
        ("first paint", _milliseconds(opening["first_paint_ms"])),
        ("the list of runs stands there", _milliseconds(opening["listed_ms"])),
        (
            "requests until then",
            f"{opening['requests']}, {in_bytes(opening['bytes'])}, "
            f"{opening['other_places']} to other places",
        ),
        ("from a click to the curves of the long run", _milliseconds(run["curves_ms"])),
        ("sent for them", in_bytes(run["bytes"])),
        ("zooming in, until it is drawn", _milliseconds(run["zoom_ms"])),
        ("the longest pause while one drags", _milliseconds(run["longest_frame_ms"])),
        (
            "memory of the server, before and after",
            f"{in_bytes(server['memory_bytes_before'])}, {in_bytes(server['memory_bytes_after'])}",
        ),
    ]


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms"
