"""`mule lab ...`: compare architectures at equal active size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mule.cli.lab_check_verb import check
from mule.cli.lab_report_verb import report
from mule.cli.lab_run_verb import Module, run
from mule.cli.perform import PLAIN, Json, Result, perform

if TYPE_CHECKING:
    from rich.console import Console

lab_app = typer.Typer(help="Compare architectures at equal active size.", **PLAIN)
lab_app.command()(run)
lab_app.command()(report)
lab_app.command()(check)


@lab_app.command()
def shapes(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CAMPAIGN] [key=value]...",
            help="A campaign file and settings of it. With --active settings of the budget, such as "
            "num_layers=12.",
            show_default=False,
        ),
    ] = None,
    *,
    active: Annotated[
        str | None,
        typer.Option(help="In place of a campaign: active parameters, such as 125m."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of the embedding. Default: the tokenizer's.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens in the cache, for the decode ceiling; with --active the length of a row too.",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=0.001, help="Of the memory, in GB/s. Default: this machine's, measured."),
    ] = None,
    module: Module = None,
    as_json: Json = False,
) -> None:
    """Sizes, FLOPs, cache and decode ceiling of each variant, before anything is trained."""

    def work() -> Result:
        from mule.commands import lab_shapes as command

        given = list(words or [])
        file = Path(given.pop(0)) if given and "=" not in given[0] else None
        return command.run(
            file,
            given,
            active=active,
            vocab_size=vocab_size,
            context=context,
            bandwidth=None if bandwidth is None else bandwidth * 1e9,
            modules=module or [],
        )

    def show(console: Console, result: Result) -> None:
        from mule.cli.render_lab_shapes import show_shapes

        show_shapes(console, result)

    perform(work, as_json=as_json, show=show)
