"""`mule doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mule.cli.perform import Json, Result, perform
from mule.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def doctor(
    run: Annotated[
        str | None, typer.Argument(help="A run's name or folder.", show_default=False)
    ] = None,
    *,
    root: Annotated[Path, typer.Option("--root", help="The folder of the runs.")] = Path("runs"),
    report: Annotated[
        bool, typer.Option("--report", help="Also write report.md, with curves, into its folder.")
    ] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="CODE", help="What a rule looks at, and why: D103.")
    ] = None,
    rules: Annotated[bool, typer.Option("--rules", help="List all rules.")] = False,
    as_json: Json = False,
) -> None:
    """Is a run healthy? While it trains or afterwards; exit code 1 when an alarm stands."""

    def work() -> Result:
        from mule.commands import doctor as command

        given = [name for name, value in (("--explain", explain), ("--rules", rules)) if value]
        if len(given) + (run is not None) != 1:
            raise UserError(
                f"mule doctor takes a run, --explain CODE or --rules, not {_listed(run, given)}",
                "for example: mule doctor runs/my-run",
            )
        if explain is not None:
            return command.explain(explain)
        return command.rules() if rules else command.run(run or "", root=root, report=report)

    perform(work, as_json=as_json, show=_show)


def _listed(run: str | None, given: list[str]) -> str:
    return " and ".join([run, *given] if run else given) or "nothing"


def _show(console: Console, result: dict[str, Any]) -> None:
    from mule.cli import render_doctor

    if "sections" in result:
        render_doctor.show_rule(console, result)
    elif "rules" in result:
        render_doctor.show_rules(console, result)
    else:
        render_doctor.show_findings(console, result)
