"""A comparison as markdown, with its pictures beside it, or as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mule import fsio
from mule.commands.plot import curve_of
from mule.lab.document import Block, Document, Figures, Items, Section, Table, Text, to_markdown
from mule.lab.page import to_page
from mule.lab.plot_axes import Axis
from mule.lab.plots import Figure, Line, line_plot
from mule.lab.wording import seconds, size_in_bytes
from mule.run import Run

_SETTLED = 0.05  # of a run: before it the loss falls from ln(vocabulary), and would set the scale
_LEGEND = (
    "A ? marks a value that was not read at its source; the last table says what it rests on. near: as "
    "published; ahead and behind: beyond the published; unusual: look again; not comparable: no like."
)


def write(found: dict[str, Any], files: Sequence[Path]) -> list[Path]:
    """Write the comparison to each file, by its ending; the files that were written."""
    document = _of_runs(found) if found["compared"] == "runs" else _of_setups(found)
    for file in files:
        if file.suffix == ".html":
            fsio.write_text(file, to_page(document))
            continue
        pictures = f"{file.stem}-figures"
        for figure in document.figures:
            fsio.write_text(file.parent / pictures / f"{figure.name}.svg", figure.file_text())
        fsio.write_text(file, to_markdown(document, pictures))
    return list(files)


# ---------------------------------------------------------------- setups


def _of_setups(found: dict[str, Any]) -> Document:
    beside = [setup["title"] for setup in found["beside"]]
    sections = [
        Section("In words", [Text(found["words"])]),
        Section("Parameter by parameter", [_parameters(found, beside), Text(_LEGEND, "note")]),
        Section("Points of attention", [_items(found["attention"], "None.")]),
        Section("Strengths", [_items(found["strengths"], "None that the catalogue can show.")]),
        Section("Starting again, fast and good", _changes(found["edits"])),
    ]
    if found["hearsay"]:
        lines = [f"{row['setup']}: said is {row['said']}; {row['so']}" for row in found["hearsay"]]
        sections.append(Section("Hearsay", [Items(lines)]))
    sections.append(Section("Sources", [_sources(found["sources"])]))
    title = f"{found['yours']['title'][:1].upper()}{found['yours']['title'][1:]}"
    return Document(title, f"Beside {', '.join(beside) or 'nothing'}", sections)


def _parameters(found: dict[str, Any], beside: Sequence[str]) -> Table:
    columns = ["parameter", "yours", *beside, "verdict", "reason"]
    rows = [
        [row["parameter"], row["yours"], *row["beside"], row["verdict"], row["reason"]]
        for row in found["rows"]
    ]
    words = (*range(1, len(columns) - 2), len(columns) - 2, len(columns) - 1)
    return Table("What is known of each", columns, rows, words)


def _items(lines: Sequence[str], otherwise: str) -> Block:
    return Items(lines) if lines else Text(otherwise)


def _changes(edits: Sequence[dict[str, str]]) -> list[Block]:
    if not edits:
        return [Text("Change nothing.")]
    rows = [[edit["setting"], edit["why"], edit["saves"], edit["costs"]] for edit in edits]
    columns = ["setting", "why", "saves", "costs"]
    return [Table("Settings for the recipe or the command line", columns, rows, (1, 2, 3))]


def _sources(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ["setup", "parameter", "value", "source", "note"]
    told = [
        [
            row["setup"],
            row["parameter"],
            row["value"],
            row["source"],
            "; ".join(
                text
                for text in (
                    row["note"],
                    f"not read at the source, it rests on: {row['rests_on']}"
                    if row["rests_on"]
                    else "",
                )
                if text
            ),
        ]
        for row in rows
    ]
    return Table("Where every value is from", columns, told, (1, 2, 3, 4))


# ---------------------------------------------------------------- runs


def _of_runs(found: dict[str, Any]) -> Document:
    names = [row["run"] for row in found["runs"]]
    sections = [
        Section("In words", [Items(found["significance"]["words"])]),
        Section("Curves", [Figures(_curves(found["runs"]))]),
        Section("How far they came", [_reached(found["runs"])]),
        Section("Settings that differ", [_differing(found, names)]),
    ]
    if differences := found["significance"]["differences"]:
        sections.append(
            Section("Over seeds", [_seeds(differences, found["significance"]["label"])])
        )
    return Document("Runs side by side", ", ".join(names), sections)


def _curves(runs: Sequence[dict[str, Any]]) -> list[Figure]:
    """Training loss, smoothed, and validation loss where it was measured."""
    curves = [curve_of(Run.open(row["folder"]), "tokens") | {"name": row["run"]} for row in runs]
    axes = (Axis("trained tokens", low=0.0), Axis("loss (nats a token)"))
    training = [
        Line(curve["name"], place, *_from(curve["x"], curve["smoothed"]))
        for place, curve in enumerate(curves)
    ]
    told = "Running mean; the fall of the first updates is left out."
    pictures = [line_plot("training-loss", "Training loss", told, training, axes)]
    held_out = [
        Line(curve["name"], place, *map(list, zip(*curve["valid"])), marks=True)
        for place, curve in enumerate(curves)
        if curve["valid"]
    ]
    if held_out:
        told = "At every evaluation."
        pictures.append(line_plot("validation-loss", "Validation loss", told, held_out, axes))
    return pictures


def _from(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    first = int(len(x) * _SETTLED)
    return list(x[first:]), list(y[first:])


def _reached(runs: Sequence[dict[str, Any]]) -> Table:
    names = [name for name in runs[0] if name not in ("run", "folder")]
    columns = ["run", *(name.replace("_", " ") for name in names)]
    rows = [[row["run"], *(figure(name, row[name]) for name in names)] for row in runs]
    return Table("Losses in nats; speed is the median, memory the peak", columns, rows)


def figure(name: str, value: Any) -> str:
    """A figure of a run as text."""
    if value is None:
        return "-"
    if name == "memory_bytes":
        return size_in_bytes(value)
    if name == "seconds":
        return seconds(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _differing(found: dict[str, Any], names: Sequence[str]) -> Block:
    rows = [*found["differs"], *found["differs_mechanically"]]
    if not rows:
        return Text("None: they were trained with the same settings.")
    told = [
        [row["key"], *(json.dumps(value, default=str) for value in row["values"]), _effect(row)]
        for row in rows
    ]
    words = tuple(range(1, len(names) + 2))
    return Table(
        "Settings without effect count as default", ["setting", *names, "it changes"], told, words
    )


def _effect(row: dict[str, Any]) -> str:
    return "what is learned" if row["role"] == "identity" else "speed, storage or reporting only"


def _seeds(differences: Sequence[dict[str, Any]], label: str) -> Table:
    rows = [
        [
            f"{row['second']} − {row['first']}",
            str(len(row["seeds"])),
            figure("mean", row["mean"]),
            figure("half_width", row["half_width"]),
            figure("p", row["p"]),
            "yes" if row["is_beyond_noise"] else "no",
        ]
        for row in differences
    ]
    columns = ["difference", "seeds", label, "± (95%)", "p (Holm)", "beyond seed noise"]
    return Table("Paired over seeds, Student's t", columns, rows)
