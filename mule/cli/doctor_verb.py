"""`mule doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    env: Annotated[
        bool,
        typer.Option("--env", help="This machine instead of a run: what works, what is missing."),
    ] = False,
    lang: Annotated[Literal["en", "fr"], typer.Option(help="The language of the findings.")] = "en",
    as_json: Json = False,
) -> None:
    """Is a run healthy? While it trains or afterwards; exit code 1 when an alarm stands."""

    def work() -> Result:
        from mule.commands import doctor as command

        asked = {"--explain": explain is not None, "--rules": rules, "--env": env}
        given = [name for name, is_given in asked.items() if is_given]
        _check(run, given, report=report, in_english=lang == "en")
        if env:
            from mule.commands import doctor_env

            return doctor_env.run()
        if explain is not None:
            return command.explain(explain)
        if rules:
            return command.rules(language=lang)
        return command.run(run or "", root=root, report=report, language=lang)

    perform(work, as_json=as_json, show=_show)


def _check(run: str | None, given: list[str], *, report: bool, in_english: bool) -> None:
    """UserError of words that say nothing together."""
    if run is not None and given == ["--env"]:
        raise UserError(
            f"--env looks at the machine, not at the run {run}",
            f"one of the two: mule doctor --env; mule doctor {run}",
        )
    if len(given) + (run is not None) != 1:
        named = " and ".join([run, *given] if run else given) or "nothing"
        raise UserError(
            f"mule doctor takes a run, --explain CODE, --rules or --env, not {named}",
            "for example: mule doctor runs/my-run",
        )
    written = "--report" if report else given[0] if given and given != ["--rules"] else ""
    if written and not in_english:
        raise UserError(
            f"what {written} tells is in English only: --lang cannot take effect",
            "leave --lang away; the findings of a run are told in French: mule doctor RUN --lang fr",
        )
    if report and given:
        raise UserError(
            f"--report writes report.md of a run; {given[0]} has none",
            "for example: mule doctor runs/my-run --report",
        )


def _show(console: Console, result: dict[str, Any]) -> None:
    from mule.cli import render_doctor, render_env

    if "capabilities" in result:
        render_env.show_env(console, result)
    elif "sections" in result:
        render_doctor.show_rule(console, result)
    elif "rules" in result:
        render_doctor.show_rules(console, result)
    else:
        render_doctor.show_findings(console, result)
