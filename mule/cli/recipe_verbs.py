"""`mule recipe`: the verbs over the recipes that come with Mule, and over other tools' settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mule.cli.perform import PLAIN, Json, Result, perform, tabled

if TYPE_CHECKING:
    from rich.console import Console

recipe_app = typer.Typer(help="The recipes that come with Mule, and those of other tools.", **PLAIN)


@recipe_app.command("list")
def recipe_list(
    memory: Annotated[
        str | None, typer.Option(help="Only those that a machine with so much can train: 16GB.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Only models made for this: chat or code.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Their names; for fine-tuning, what each model takes of memory, disk and time."""

    def work() -> Result:
        from mule.commands import recipes

        return recipes.list_recipes(memory=memory, task=task)

    perform(work, as_json=as_json, show=tabled("show_recipes"))


@recipe_app.command("show")
def recipe_show(
    name: Annotated[str, typer.Argument(help="A recipe's name.")], as_json: Json = False
) -> None:
    """The text of one."""

    def work() -> Result:
        from mule.commands import recipes

        return recipes.show(name)

    perform(work, as_json=as_json, show=lambda console, shown: console.out(shown["text"], end=""))


@recipe_app.command("import")
def recipe_import(
    file: Annotated[Path, typer.Argument(help="A file of Axolotl, LLaMA-Factory, TRL, ...")],
    *,
    told: Annotated[
        str | None, typer.Option("--from", help="Whose it is, where its keys do not tell.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The recipe to write.")] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="How many GPUs it ran on there, for the batch.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model, where it is another here.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="The training data, where it is elsewhere here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn another tool's settings into a recipe, with what differs and what looks wrong.

    Axolotl, LLaMA-Factory, TRL, LitGPT, mlx-lm and DonkeyTune: YAML, a command line or variables.
    """

    def work() -> Result:
        from mule.commands import recipe_import as command

        return command.run(file, told=told, out=out, devices=devices, model=model, data=data)

    def show(console: Console, result: Result) -> None:
        from mule.cli.render_import import show_import

        show_import(console, result)

    perform(work, as_json=as_json, show=show)
