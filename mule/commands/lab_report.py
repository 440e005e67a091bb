"""`mule lab report`: a campaign's folder as a report, in markdown and as a page."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.commands.lab_run import CAMPAIGNS

if TYPE_CHECKING:
    from mule.lab.document import Block


def run(folder: Path) -> dict[str, Any]:
    """Write report.md and report.html into `folder`; every statistic in them, and what is missing.

    A campaign that is not finished is reported as far as it is.
    """
    from mule.lab.report import write_report

    found = write_report(folder)
    return {**found, "next": _next_command(found)}


def _next_command(found: dict[str, Any]) -> str:
    """Export the run with the lowest test loss of the variant that ranks first; of a module of the
    user's, which Mule cannot export, show it."""
    best = found["best_run"]
    if not best:
        return "mule lab run CAMPAIGN.yaml"
    is_own = found["best_arm"] in found["own_modules"]
    return f"mule {'runs show' if is_own else 'export'} {shlex.quote(best)}"


# ---------------------------------------------------------------- for a page


def list_campaigns(root: Path = CAMPAIGNS) -> dict[str, Any]:
    """The campaigns below `root` with how many trained models each has, the newest first."""
    folders = [file.parent for file in root.glob("*/campaign.yaml")]
    rows = []
    for folder in folders:
        results = list(folder.glob("results/*.json"))
        written = [file.stat().st_mtime for file in (*results, folder / "campaign.yaml")]
        row = {"campaign": folder.name, "folder": str(folder), "results": len(results)}
        rows.append({**row, "changed_at": max(written)})
    rows.sort(key=lambda row: row["changed_at"], reverse=True)
    return {"campaigns": rows, "next": "mule lab run CAMPAIGN.yaml"}


def read(folder: Path) -> dict[str, Any]:
    """The report as plain values, without writing it: title, subtitle, sections of blocks.

    A block's `kind` is text, items, table or figures; a figure's `svg` is a file of its own.
    """
    from mule.lab.report import compose

    evidence, document = compose(folder)
    return {
        "title": document.title,
        "subtitle": document.subtitle,
        "sections": [
            {"title": section.title, "blocks": [_plain(block) for block in section.blocks]}
            for section in document.sections
        ],
        "missing": evidence.found["missing"],
        "next": _next_command(evidence.found),
    }


def _plain(block: Block) -> dict[str, Any]:
    from mule.lab.document import Figures, Items, Table

    if isinstance(block, Figures):
        told = [
            {"title": each.title, "description": each.description, "svg": each.file_text()}
            for each in block.figures
        ]
        return {"kind": "figures", "figures": told}
    if isinstance(block, Table):
        return {"kind": "table", **asdict(block)}
    if isinstance(block, Items):
        return {"kind": "items", "lines": list(block.items)}
    return {"kind": "text", "words": block.words, "manner": block.kind}
