"""What `mule recipe import` says: the settings side by side, then all that is not the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mule.cli import render

if TYPE_CHECKING:
    from rich.console import Console

_GRAVITY = {3: "learns nothing or stops", 2: "wrecks the run", 1: "wastes it"}


def show_import(console: Console, result: dict[str, Any]) -> None:
    """The table, the suspected mistakes, the traps, the losses, what is left, and the recipe."""
    render.print_table(
        console,
        f"{result['file']}: settings of {result['tool']} ({_because(result)})",
        ["key", "value", "ours", "becomes", "note"],
        [
            [row["key"], row["value"], row["ours"], row["ours_value"], row["note"]]
            for row in result["rows"]
        ],
    )
    _mistakes(console, result)
    _listed(console, "Traps", [f"{trap['key']}: {trap['text']}" for trap in result["traps"]])
    losses = [f"{_place(one)}: {one['happens']}" for one in result["losses"]]
    _listed(console, "No equivalent, and what happens", losses)
    unknown = [f"{_place(one)}: {result['tool']} has no such key" for one in result["unknown"]]
    _listed(console, "Not known", unknown)
    for key, what in (
        ("left_to_mule", "speed and memory, which Mule decides by itself"),
        ("left_out", "logging, files and names"),
    ):
        if result[key]:
            render.print_line(console, f"\nLeft out ({what}): {', '.join(result[key])}")
    if result["out"] is None:
        render.print_line(console, f"\n{result['recipe']}")
    else:
        render.print_line(console, f"\nwritten to {result['out']}")


def _because(result: dict[str, Any]) -> str:
    if result["confidence"] == "told":
        return "as --from says"
    return f"{result['confidence']}: {', '.join(result['signs'])}"


def _mistakes(console: Console, result: dict[str, Any]) -> None:
    lines = []
    for one in result["mistakes"]:
        source = f" [{one['source']}]" if one["source"] else ""
        lines.append(f"{_place(one)}: {one['found']} ({_GRAVITY[one['gravity']]})")
        lines.append(f"  {one['why']}{source}")
        lines.append(f"  usual: {one['do']}")
    _listed(console, "Looks like a mistake", lines)


def _place(one: dict[str, Any]) -> str:
    return f"line {one['line']}: {one['key']}" if one["line"] else one["key"]


def _listed(console: Console, title: str, lines: list[str]) -> None:
    if lines:
        render.print_line(console, f"\n{title}")
        for line in lines:
            render.print_line(console, f"  {line}")
