"""`mule lab report`: a campaign's folder as a report, in markdown and as a page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any


def run(folder: Path) -> dict[str, Any]:
    """Write report.md and report.html into `folder`; every statistic in them, and what is missing.

    A campaign that is not finished is reported as far as it is.
    """
    from mule.lab.report import write_report

    found = write_report(folder)
    return {**found, "next": _next_command(found)}


def _next_command(found: dict[str, Any]) -> str:
    """Export the run with the lowest test loss of the variant that ranks first."""
    best = found["best_run"]
    return f"mule export {shlex.quote(best)}" if best else "mule lab run CAMPAIGN.yaml"
