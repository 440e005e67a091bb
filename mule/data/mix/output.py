"""The folder of a mix: its rows, its figures in mix.json, its card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mule import __version__, fsio, progress
from mule.data.clean.compare import TrainingItem
from mule.data.mix.card import card
from mule.data.mix.pool import REASONS, Pool
from mule.data.mix.sources import Source, inside
from mule.data.sources.items import Document
from mule.errors import UserError

FIGURES = "mix.json"
_MAKERS = ("mule data mix", "mule data split")
_LIBRARIES = ("rensa", "numpy", "pyarrow")


def check_out(out: Path, sources: Sequence[Source]) -> None:
    """Refuse a folder whose content would be lost, or read again as a source. Raises UserError."""
    elsewhere = "choose another folder for --out"
    for source in sources:
        if Path(source.given).is_dir() and inside(out, source.given):
            raise UserError(f"--out {out} lies inside the source {source.given}", elsewhere)
        for file in source.files:
            if inside(file, out):
                raise UserError(
                    f"--out {out} would be replaced, and the source {file} lies in it", elsewhere
                )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file", elsewhere)
    if out.is_dir() and any(out.iterdir()) and not _is_a_mix(out):
        raise UserError(
            f"--out {out} holds other files: it was not made by mule data mix or split", elsewhere
        )


def write(
    out: Path, pool: Pool, train: list[int], valid: list[int], made: dict[str, Any]
) -> dict[str, Any]:
    """Replace `out`, all at once; the figures that its mix.json holds."""
    figures = {
        "mule": __version__,
        "libraries": {name: version(name) for name in _LIBRARIES},
        **made,
        "train": len(train),
        "valid": len(valid),
        "sources": _source_figures(pool, train, valid),
        "examples": {
            reason: pool.examples[reason] for reason in REASONS if reason in pool.examples
        },
    }
    with fsio.atomic_folder(out) as folder:
        with progress.task("Writing", total=len(train) + len(valid), unit="rows") as bar:
            _write_rows(folder / "train.jsonl", pool, train, bar)
            if valid:
                _write_rows(folder / "valid.jsonl", pool, valid, bar)
        fsio.write_json(folder / FIGURES, figures)
        fsio.write_text(folder / "README.md", card(figures))
    return figures


def row_of(item: TrainingItem, source: str) -> dict[str, Any]:
    """The item as a row of JSON, in the format `messages` or `text`."""
    origin = {"source": source, **({"category": item.category} if item.category else {})}
    if isinstance(item, Document):
        return {"text": item.text, **origin}
    tools = item.tool_list()
    return {
        "messages": item.as_dicts(),
        **({} if tools is None else {"tools": tools}),
        **origin,
    }


def _write_rows(file: Path, pool: Pool, numbers: Sequence[int], bar: progress.Task) -> None:
    with open(file, "w", encoding="utf-8", newline="\n") as opened:
        for number in numbers:
            source = pool.sources[pool.source_of[number]].name
            row = row_of(pool.items[number], source)
            opened.write(json.dumps(row, ensure_ascii=False) + "\n")
            bar.advance()


def _source_figures(pool: Pool, train: list[int], valid: list[int]) -> list[dict[str, Any]]:
    """Of each source: its files, and what became of its rows."""
    train_rows = Counter(pool.source_of[number] for number in train)
    valid_rows = Counter(pool.source_of[number] for number in valid)
    kept = Counter(pool.source_of[number] for number in {*train, *valid})
    with progress.task("Hashing the sources", total=len(pool.sources), unit="sources") as bar:
        found = []
        for number, source in enumerate(pool.sources):
            counts = pool.counts(number)
            found.append(
                {
                    "name": source.name,
                    "given": source.given,
                    **counts,
                    "kept": kept[number],
                    "train": train_rows[number],
                    "valid": valid_rows[number],
                    "licences": _licences(source),
                    "files": source.sums(),
                }
            )
            bar.advance()
    return found


def _licences(source: Source) -> list[str]:
    """Files beside the source that look like its licence."""
    folders = {file.parent for file in source.files}
    return sorted(
        str(entry)
        for folder in folders
        for entry in folder.iterdir()
        if entry.name.lower().startswith(("license", "licence", "copying")) and entry.is_file()
    )


def _is_a_mix(folder: Path) -> bool:
    figures = fsio.read_json(folder / FIGURES) if (folder / FIGURES).is_file() else {}
    return isinstance(figures, dict) and figures.get("made_by") in _MAKERS
