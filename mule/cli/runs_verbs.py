"""`mule runs`: parse and call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mule.cli.compare_verb import Out
from mule.cli.perform import PLAIN, Json, Result, perform, tabled
from mule.cli.watch_verb import watch

if TYPE_CHECKING:
    from rich.console import Console

runs_app = typer.Typer(help="Look at runs.", **PLAIN)
runs_app.command("watch")(watch)

Root = Annotated[Path, typer.Option("--root", help="The folder of the runs.")]


@runs_app.command("list")
def runs_list(root: Root = Path("runs"), as_json: Json = False) -> None:
    """The runs here, newest first."""

    def work() -> Result:
        from mule.commands import runs

        return runs.list_runs(root)

    perform(work, as_json=as_json, show=tabled("show_runs"))


@runs_app.command("show")
def runs_show(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """State, figures, checkpoints, lineage and the reasons of one run."""

    def work() -> Result:
        from mule.commands import runs

        return runs.show(run, root)

    perform(work, as_json=as_json)


@runs_app.command("plot")
def runs_plot(
    runs: Annotated[list[str], typer.Argument(help="Names or folders of runs.")],
    out: Annotated[Path, typer.Option(help="The file to write: .svg, .png or .pdf.")],
    by: Annotated[str, typer.Option(help="What the axis counts: tokens or steps.")] = "tokens",
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Draw the training and validation loss of runs."""

    def work() -> Result:
        from mule.commands import plot as command

        return command.run(runs, out, by=by, root=root)

    perform(work, as_json=as_json)


@runs_app.command("forecast")
def runs_forecast(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    *,
    at: Annotated[
        list[int] | None, typer.Option("--at", help="Updates to forecast as well; repeatable.")
    ] = None,
    from_share: Annotated[
        float | None,
        typer.Option(help="What would have been said at this share of the run, such as 0.5."),
    ] = None,
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """The losses to expect with intervals, when to stop, and what twice as much would give."""

    def work() -> Result:
        from mule.commands import forecast as command

        return command.run(run, at=at or (), from_share=from_share, root=root)

    perform(work, as_json=as_json, show=_show_forecast)


def _show_forecast(console: Console, result: Result) -> None:
    from mule.cli import render_forecast

    render_forecast.show_forecast(console, result)


@runs_app.command("compare")
def runs_compare(
    runs: Annotated[list[str], typer.Argument(help="Names or folders of two runs or more.")],
    out: Out = None,
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Runs side by side: settings that differ, losses, speed, and what their seeds can show."""

    def work() -> Result:
        from mule.commands import compare as command
        from mule.run import Run

        return command.compare_runs([Run.open(run, root) for run in runs], out=out or ())

    from mule.cli.render_compare import show_comparison

    perform(work, as_json=as_json, show=show_comparison)
