"""A comparison on the terminal: the table, what stands out, what to change, the closing words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mule.cli import render
from mule.cli.figures import figure

if TYPE_CHECKING:
    from rich.console import Console

_WIDEST = 36  # of a value; the files hold it whole


def show_comparison(console: Console, result: dict[str, Any]) -> None:
    """Setups, runs or the catalogue, whichever the result is of."""
    if "published" in result:
        _show_catalogue(console, result["published"])
    elif result["compared"] == "runs":
        _show_runs(console, result)
    else:
        _show_setups(console, result)
    for file in result.get("files", ()):
        render.print_line(console, f"file  {file}")


def _show_catalogue(console: Console, rows: list[dict[str, Any]]) -> None:
    columns = ["name", "setup", "kind", "parameters", "examples or tokens", "rate", "not checked"]
    cells = [
        [
            row["name"],
            row["setup"],
            row["kind"] if row["origin"] == "published" else f"{row['kind']}, a user's",
            row["parameters"],
            row["examples_or_tokens"],
            row["learning_rate"],
            f"{row['unchecked']} of {row['values']}",
        ]
        for row in rows
    ]
    render.print_table(console, "Published setups", columns, cells)
    told = "A ? marks a value that was not read at its source; compared, it says what it rests on."
    render.print_line(console, f"\n{told}")


def _show_setups(console: Console, result: dict[str, Any]) -> None:
    beside = [setup["title"] for setup in result["beside"]]
    columns = ["parameter", "yours", *beside, "verdict"]
    rows = [
        [row["parameter"], _cut(row["yours"]), *map(_cut, row["beside"]), row["verdict"]]
        for row in result["rows"]
    ]
    title = result["yours"]["title"]
    render.print_table(console, f"{title[:1].upper()}{title[1:]}, and the published", columns, rows)
    _lines(console, "Points of attention", result["attention"])
    ahead = [row for row in result["rows"] if row["verdict"] == "ahead"]
    _lines(console, "Ahead", [f"{row['parameter']}: {row['reason']}" for row in ahead])
    near = [row["parameter"] for row in result["rows"] if row["verdict"] == "near"]
    if near:
        render.print_line(console, f"\nAs published: {', '.join(near)}")
    _lines(console, "Starting again, fast and good", [_edit(edit) for edit in result["edits"]])
    said = [f"{row['setup']}: said is {row['said']}; {row['so']}" for row in result["hearsay"]]
    _lines(console, "Hearsay", said)
    unread = [row for row in result["sources"] if not row["checked"]]
    if unread:
        told = f"{len(unread)} values, with a ?, were not read at their source"
        render.print_line(console, f"\n{told}; --out FILE.html says what they rest on")
    render.print_line(console, f"\n{result['words']}")


def _edit(edit: dict[str, str]) -> str:
    return f"{edit['setting']}  {edit['why']}. Saves: {edit['saves']}. Costs: {edit['costs']}."


def _lines(console: Console, title: str, lines: list[str]) -> None:
    if lines:
        render.print_line(console, f"\n{title}")
        for line in lines:
            render.print_line(console, f"- {line}")


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _show_runs(console: Console, result: dict[str, Any]) -> None:
    runs = result["runs"]
    names = [row["run"] for row in runs]
    rows = [
        [name.replace("_", " "), *(figure(name, row[name]) for row in runs)]
        for name in runs[0]
        if name not in ("run", "folder")
    ]
    render.print_table(console, "Runs side by side", ["", *names], rows)
    differs = [*result["differs"], *result["differs_mechanically"]]
    if differs:
        cells = [
            [row["key"], *(_cut(json.dumps(v, default=str)) for v in row["values"]), _role(row)]
            for row in differs
        ]
        render.print_table(console, "\nSettings that differ", ["setting", *names, ""], cells)
    else:
        render.print_line(console, "\nNo setting differs.")
    for line in result["significance"]["words"]:
        render.print_line(console, f"\n{line}")


def _role(row: dict[str, Any]) -> str:
    return "" if row["role"] == "identity" else "changes nothing that is learned"
