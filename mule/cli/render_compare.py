"""A comparison on the terminal: the table, what stands out, what to change, the closing words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mule.cli import render
from mule.figures import figure
from mule.french import Speaker, speaker
from mule.message import Message, joined

if TYPE_CHECKING:
    from rich.console import Console

_WIDEST = 36  # of a value; the files hold it whole


def show_comparison(console: Console, result: dict[str, Any]) -> None:
    """Setups, runs or the catalogue, whichever the result is of."""
    say = speaker(result.get("language", "en"), "compare")
    if "published" in result:
        _show_catalogue(console, result["published"], say)
    elif result["compared"] == "runs":
        _show_runs(console, result, say)
    else:
        _show_setups(console, result, say)
    for file in result.get("files", ()):
        render.print_line(console, f"file  {file}")


def _show_catalogue(console: Console, rows: list[dict[str, Any]], say: Speaker) -> None:
    columns = ["name", "setup", "kind", "parameters", "examples or tokens", "rate", "not checked"]
    cells = [
        [
            row["name"],
            row["setup"],
            say(_kind(row)),
            say(row["parameters"]),
            say(row["examples_or_tokens"]),
            say(row["learning_rate"]),
            say(Message("{} of {}", row["unchecked"], row["values"])),
        ]
        for row in rows
    ]
    columns = [say(column) for column in columns]
    render.print_table(console, say("Published setups"), columns, cells)
    told = "A ? marks a value that was not read at its source; compared, it says what it rests on."
    render.print_line(console, f"\n{say(told)}")


def _kind(row: dict[str, Any]) -> str:
    published = row["origin"] == "published"
    return row["kind"] if published else Message("{}, a user's", row["kind"])


def _show_setups(console: Console, result: dict[str, Any], say: Speaker) -> None:
    beside = [setup["title"] for setup in result["beside"]]
    columns = [say("parameter"), say("yours"), *beside, say("verdict")]
    rows = [
        [
            say(row["parameter"]),
            *(_cut(say(value)) for value in (row["yours"], *row["beside"])),
            say(row["verdict"]),
        ]
        for row in result["rows"]
    ]
    title = say(result["yours"]["title"])
    head = Message("{!s}, and the published", f"{title[:1].upper()}{title[1:]}")
    render.print_table(console, say(head), columns, rows)
    _lines(console, "Points of attention", result["attention"], say)
    ahead = [row for row in result["rows"] if row["verdict"] == "ahead"]
    reasons = [Message("{}: {}", row["parameter"], row["reason"]) for row in ahead]
    _lines(console, "Ahead", reasons, say)
    near = [row["parameter"] for row in result["rows"] if row["verdict"] == "near"]
    if near:
        render.print_line(console, "\n" + say(Message("As published: {}", joined(", ", near))))
    _lines(console, "Starting again, fast and good", [_edit(e) for e in result["edits"]], say)
    said = [
        Message("{!s}: said is {!s}; {!s}", row["setup"], row["said"], row["so"])
        for row in result["hearsay"]
    ]
    _lines(console, "Hearsay", said, say)
    if unread := sum(not row["checked"] for row in result["sources"]):
        told = Message(
            "{} values, with a ?, were not read at their source; --out FILE.html says what they rest on",
            unread,
        )
        render.print_line(console, f"\n{say(told)}")
    render.print_line(console, f"\n{say(result['words'])}")


def _edit(edit: dict[str, str]) -> Message:
    values = (edit[name] for name in ("setting", "why", "saves", "costs"))
    return Message("{!s}  {}. Saves: {}. Costs: {}.", *values)


def _lines(console: Console, title: str, lines: Sequence[str], say: Speaker) -> None:
    if lines:
        render.print_line(console, f"\n{say(title)}")
        for line in lines:
            render.print_line(console, f"- {say(line)}")


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _show_runs(console: Console, result: dict[str, Any], say: Speaker) -> None:
    runs = result["runs"]
    names = [row["run"] for row in runs]
    rows = [
        [say(name.replace("_", " ")), *(say(figure(name, row[name])) for row in runs)]
        for name in runs[0]
        if name not in ("run", "folder")
    ]
    render.print_table(console, say("Runs side by side"), ["", *names], rows)
    differs = [*result["differs"], *result["differs_mechanically"]]
    if differs:
        cells = [
            [
                row["key"],
                *(_cut(json.dumps(v, default=str)) for v in row["values"]),
                say(_role(row)),
            ]
            for row in differs
        ]
        title = "\n" + say("Settings that differ")
        render.print_table(console, title, [say("setting"), *names, ""], cells)
    else:
        render.print_line(console, "\n" + say("No setting differs."))
    for line in result["significance"]["words"]:
        render.print_line(console, f"\n{say(line)}")


def _role(row: dict[str, Any]) -> str:
    return "" if row["role"] == "identity" else "changes nothing that is learned"
