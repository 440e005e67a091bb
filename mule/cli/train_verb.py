"""`mule train`, with a recipe or with a model and its data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mule.cli.perform import Json, Result, perform, split_words, tabled
from mule.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [key=value]...",
        help="A recipe, and settings that override it; docs/configuration.md lists them.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="What to train: a hub id, a folder or a run. Without a recipe: LoRA."),
]
Data = Annotated[
    str | None,
    typer.Option(help="What to learn: a folder with train.jsonl (and valid.jsonl), or a file."),
]
Export = Annotated[
    str | None,
    typer.Option(
        metavar="TYPES",
        help="Go on to a verified GGUF file of these types, such as q4_k_m or f16,q8_0.",
    ),
]
WarmStart = Annotated[
    str | None,
    typer.Option(
        metavar="ADAPTER",
        help="A new run that begins with the weights of this adapter: for new data.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with the same run where it stopped: same data, same settings."
    ),
]
Launch = Annotated[
    str | None,
    typer.Option(
        help="Start nothing: print the command (torchrun:2x8, machines x processes) "
        "or write the script (slurm:2x8) that trains with several processes."
    ),
]


def train(
    words: Words = None,
    *,
    model: Model = None,
    data: Data = None,
    export: Export = None,
    warm_start: WarmStart = None,
    resume: Resume = False,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    launch: Launch = None,
    as_json: Json = False,
) -> None:
    """Train what a recipe says: from scratch, on chats, or an adapter.

    Without a recipe, --model X --data ./data fine-tunes X with LoRA on the chats in ./data.
    """
    recipe, given = split_words(words or [])
    assume = recipe is None and bool(model or data)
    overrides = as_settings(given, model, data, warm_start) + given
    types = [word.strip().lower() for word in export.split(",")] if export else None

    def work() -> Result:
        if launch is not None:
            from mule.commands import launch as launcher

            _refuse_launch(assume, export)
            return launcher.run(launch, recipe, overrides, resume=resume, name=name)
        options: dict[str, Any] = {"resume": resume, "name": name, "assume": assume}
        if types is not None:
            from mule.commands import to_gguf

            return to_gguf.run(recipe, overrides, types, **options)
        from mule.commands import train as command

        return command.run(recipe, overrides, **options)

    perform(work, as_json=as_json, show=_show)


def _show(console: Console, result: Result) -> None:
    from mule.cli import render

    if "stages" in result:
        tabled("show_to_gguf")(console, result)
    else:
        render.print_result(console, result)


def as_settings(
    given: list[str], model: str | None, data: str | None, warm_start: str | None
) -> list[str]:
    """The options as settings; with --data, validation files of the recipe give way to its own."""
    words = []
    if model is not None:
        words.append(f"model.path={_quoted(model)}")
    if data is not None:
        words.append(f"data.train=[{_quoted(data)}]")
        if not any(word.startswith("data.valid=") for word in given):
            words.append("data.valid=null")
    if warm_start is not None:
        words.append(f"adapter.warm_start={_quoted(warm_start)}")
    return words


def _quoted(text: str) -> str:
    """YAML reads it back as it is, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def _refuse_launch(assume: bool, export: str | None) -> None:
    if assume:
        raise UserError(
            "--launch needs a recipe: --model and --data leave settings open, which are decided "
            "where the training runs",
            "name one, as mule train qwen2.5-0.5b --data ./data --launch ...; see: mule recipe list",
        )
    if export:
        raise UserError(
            "--export cannot follow --launch, which only prints a command",
            "leave it out, and export when the training has ended: mule export RUN",
        )
