"""`mule eval`: models on held-out rows and tasks, beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mule.cli.perform import Base, Json, Result, perform
from mule.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        help="Runs, model folders, hub ids or GGUF files; the others are compared with the first.",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="A task of Mule (general, gsm8k, stops, repetition), held-out, or a task file of "
        "yours; repeatable.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="The rows of a task without any, or to score on; repeatable."),
]
MaxItems = Annotated[
    int | None, typer.Option(min=1, help="Items of each task at most, spread over all.")
]
MaxRows = Annotated[int | None, typer.Option(min=1, help="Held-out rows to use at most.")]
NoBase = Annotated[
    bool, typer.Option("--no-base", help="Do not measure an adapter's base beside it.")
]
Out = Annotated[
    Path | None, typer.Option(help="A JSON file for everything, with each item's answer.")
]
Failures = Annotated[int, typer.Option(min=0, help="Show so many of the worst items of each task.")]
Export = Annotated[
    tuple[str, Path] | None,
    typer.Option(
        metavar="lm-eval DIR", help="Measure nothing: write the tasks for another program."
    ),
]


def evaluate(
    sources: Models = None,
    *,
    task: Tasks = None,
    data: Data = None,
    max_items: MaxItems = None,
    max_rows: MaxRows = None,
    base: Base = None,
    no_base: NoBase = False,
    out: Out = None,
    show_failures: Failures = 0,
    export: Export = None,
    as_json: Json = False,
) -> None:
    """Did it help, and did it break anything? Loss on held-out data, and scores on tasks."""

    def work() -> Result:
        from mule.commands import eval as command

        if export is not None:
            return command.export(task or [], export[0], export[1], data)
        if not sources:
            raise UserError("no model is named", "mule eval MODEL, as runs/my-lora")
        return command.run(
            sources,
            tasks=task or [],
            data=data,
            limits=command.Limits(max_rows, max_items),
            base=base,
            with_base=not no_base,
            out=out,
            show_failures=show_failures,
        )

    def show(console: Console, result: Result) -> None:
        from mule.cli import render, render_eval

        (render_eval.show_eval if "models" in result else render.print_result)(console, result)

    perform(work, as_json=as_json, show=show)
