"""The report of a campaign: the sections in their order, and the files they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mule import fsio, progress
from mule.lab.document import Document, Section, Table, to_markdown
from mule.lab.findings import Evidence, gather
from mule.lab.page import to_page
from mule.lab.record_checks import refuse_incomparable
from mule.lab.records import read_study
from mule.lab.report_experts import experts
from mule.lab.report_losses import curves, ranking, sizes, techniques
from mule.lab.report_search import search
from mule.lab.report_setting import in_short, limits, missing, question, setup, shapes
from mule.lab.report_speed import compiling, decoding, stability, training
from mule.lab.wording import MISSING, UNKNOWN

FIGURES = "report-figures"  # the folder of the pictures that report.md shows


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.md, its pictures and report.html into a campaign's folder; the statistics.

    Raises UserError where the folder holds nothing that can be compared.
    """
    evidence, document = compose(folder)
    for figure in document.figures:
        fsio.write_text(folder / FIGURES / f"{figure.name}.svg", figure.file_text())
    _remove_old_figures(folder / FIGURES, {f"{f.name}.svg" for f in document.figures})
    files = {"markdown": folder / "report.md", "html": folder / "report.html"}
    fsio.write_text(files["markdown"], to_markdown(document, FIGURES))
    fsio.write_text(files["html"], to_page(document))
    return {**evidence.found, "files": {kind: str(file) for kind, file in files.items()}}


def compose(folder: Path) -> tuple[Evidence, Document]:
    """What was found in a campaign's folder, and the report of it; nothing is written.

    Raises UserError where the folder holds nothing that can be compared.
    """
    with progress.task("Reading the campaign", total=None, unit=""):
        study = read_study(folder)
        refuse_incomparable(study)
        evidence = gather(study)
    return evidence, build(evidence)


def build(evidence: Evidence) -> Document:
    """The report of what was found."""
    study = evidence.study
    name = str(study.asked.get("name") or study.folder.resolve().name)
    sections: list[Section | None] = [
        in_short(evidence),
        question(evidence),
        setup(evidence),
        search(evidence),
        shapes(evidence),
        ranking(evidence),
        techniques(evidence),
        curves(evidence),
        sizes(evidence),
        training(evidence),
        stability(evidence),
        decoding(evidence),
        experts(evidence),
        compiling(evidence),
        limits(evidence),
        missing(evidence),
    ]
    count = len(study.results)
    subtitle = (
        f"{len(study.variants)} variants, seeds {', '.join(map(str, study.seeds))}, {count} trained "
        "models. Every number and plot is computed from the campaign's records by mule lab report."
    )
    own = evidence.found["own_modules"]
    kept = [_with_unknown(section, own) for section in sections if section is not None]
    return Document(f"Architectures compared: {name}", subtitle, kept)


def _with_unknown(section: Section, own: list[str]) -> Section:
    """What a table lacks of a module of the user's is not missing: nobody can know it."""

    def told(row: Sequence[str]) -> Sequence[str]:
        return [UNKNOWN if cell == MISSING else cell for cell in row] if row[0] in own else row

    blocks = [
        replace(block, rows=[told(row) for row in block.rows])
        if isinstance(block, Table)
        else block
        for block in section.blocks
    ]
    return replace(section, blocks=blocks)


def _remove_old_figures(folder: Path, kept: set[str]) -> None:
    """Pictures of an earlier report that this one does not show."""
    for file in folder.glob("*.svg"):
        if file.name not in kept:
            file.unlink()
