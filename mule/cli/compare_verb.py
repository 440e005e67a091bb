"""`mule compare`: parse and call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mule.cli.perform import Json, Result, perform

Out = Annotated[
    list[Path] | None,
    typer.Option("--out", help="A file to write it to as well: .md or .html; may be repeated."),
]


def compare(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|RUN|NAME [RECIPE|RUN|NAME]... [key=value]...",
            help="Yours first, then what it is compared with: the three nearest published setups "
            "where nothing is named. key=value changes the first recipe.",
            show_default=False,
        ),
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="The published setups.")] = False,
    out: Out = None,
    root: Annotated[Path, typer.Option(help="The folder of the runs.")] = Path("runs"),
    lang: Annotated[Literal["en", "fr"], typer.Option(help="The language of what is said.")] = "en",
    as_json: Json = False,
) -> None:
    """Your setup beside published ones, parameter by parameter; or two runs side by side."""

    def work() -> Result:
        from mule.commands import compare as command

        if list_all:
            return command.told(command.list_published(), lang)
        return command.run(words or [], out=out or (), root=root, language=lang)

    from mule.cli.render_compare import show_comparison

    perform(work, as_json=as_json, show=show_comparison)
