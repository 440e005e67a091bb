"""`mule lab check`: a module of the user's, examined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mule.cli.perform import Json, Result, perform

if TYPE_CHECKING:
    from rich.console import Console


def check(
    module: Annotated[str, typer.Argument(help="FILE.py:Class, a torch.nn.Module of yours.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="What the class needs to be built, or its config: n_layer=2 n_embd=64.",
            show_default=False,
        ),
    ] = None,
    *,
    limit_s: Annotated[
        float, typer.Option("--limit-s", min=1, help="Seconds that each check may take.")
    ] = 300.0,
    as_json: Json = False,
) -> None:
    """Examine a model of your own: parameters, cache, causality, graph breaks, what to change.

    The file is run, in a process of its own.
    """

    def work() -> Result:
        from mule.commands import lab_check as command

        return command.run(module, settings or [], limit_s=limit_s)

    def show(console: Console, result: Result) -> None:
        from mule.cli.render_lab_check import show_lab_check

        show_lab_check(console, result)

    perform(work, as_json=as_json, show=show)
