"""`mule lab report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mule.cli.perform import Json, Result, perform

if TYPE_CHECKING:
    from rich.console import Console


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a campaign, finished or not.")],
    as_json: Json = False,
) -> None:
    """Write report.md and report.html: rankings, differences beyond seed noise, curves, speeds."""

    def work() -> Result:
        from mule.commands import lab_report as command

        return command.run(folder)

    def show(console: Console, result: Result) -> None:
        from mule.cli.render_lab_report import show_report

        show_report(console, result)

    perform(work, as_json=as_json, show=show)
