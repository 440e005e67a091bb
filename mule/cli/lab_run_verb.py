"""`mule lab run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mule.cli.perform import Json, Result, perform

Module = Annotated[
    list[str] | None,
    typer.Option(
        "--module",
        metavar="FILE.py",
        help="A file of yours that a variant names, and that may be run. Give it once for each file.",
        show_default=False,
    ),
]


def run(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CAMPAIGN [key=value]...",
            help="A campaign file, or the name of one that comes with Mule, and settings of it.",
            show_default=False,
        ),
    ],
    *,
    only: Annotated[
        str | None, typer.Option(metavar="VARIANT", help="Make the runs of one variant.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and how long they take; make none.")
    ] = False,
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm", help="Prepare the data, and write the script of an array with a task a run."
        ),
    ] = False,
    task: Annotated[
        int | None,
        typer.Option(min=0, help="Make the run of this number alone: a task of that array."),
    ] = None,
    module: Module = None,
    root: Annotated[Path, typer.Option(help="The folder of the campaigns.")] = Path("campaigns"),
    as_json: Json = False,
) -> None:
    """Train every variant of a campaign from every seed, alike, and measure what came out.

    Stopped or killed, the same command goes on where it was.
    """

    def work() -> Result:
        from mule.commands import lab_run as command

        return command.run(
            Path(words[0]),
            words[1:],
            root=root,
            only=only,
            dry_run=dry_run,
            slurm=slurm,
            task=task,
            modules=module or [],
        )

    perform(work, as_json=as_json)
