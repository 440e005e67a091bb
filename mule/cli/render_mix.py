"""What `mule data mix` and `mule data split` say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mule.cli import render

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_NOTES = 10


def print_mix(console: Console, result: dict[str, Any]) -> None:
    """A row for each source, the notes, and where everything is."""
    reasons = [reason for reason, count in result["removed"].items() if count]
    columns = ["source", "read", *reasons, "kept", "train", "valid"]
    rows = [
        [source["name"], *(source[name] for name in columns[1:])] for source in result["sources"]
    ]
    if len(rows) > 1:
        rows.append(["all", *(sum(row[place] for row in rows) for place in range(1, len(columns)))])
    title = f"{result['train']:,} rows to train on, {result['valid']:,} to validate with"
    render.print_table(console, title, columns, rows)
    for note in result["notes"][:_SHOWN_NOTES]:
        render.print_line(console, f"note: {note}")
    if (more := len(result["notes"]) - _SHOWN_NOTES) > 0:
        render.print_line(console, f"and {more} more notes, in the card")
    render.print_line(console, f"\nfolder  {result['out']}")
    render.print_line(console, f"card    {result['card']}")
