"""What `mule lab report` shows: the ranking, what each technique changes, where the report is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mule.cli.render import print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console


def show_report(console: Console, result: dict[str, Any]) -> None:
    """The statistics in short; the rest is in the files."""
    rows = [
        [row["arm"], len(row["seeds"]), *_loss(row["test"]["loss"])] for row in result["ranking"]
    ]
    print_table(console, "", ["variant", "seeds", "test loss", "±"], rows)
    for row in result["differences"]:
        print_line(console, f"{row['technique']}: {row['told']}")
    for kind in ("warnings", "missing"):
        for told in result[kind]:
            print_line(console, f"{kind.removesuffix('s')}: {told}")
    for file in result["files"].values():
        print_line(console, f"wrote {file}")


def _loss(interval: dict[str, Any] | None) -> tuple[str, str]:
    if interval is None:
        return "missing", ""
    half = interval["half_width"]
    return f"{interval['mean']:.4f}", "" if half is None else f"{half:.4f}"
