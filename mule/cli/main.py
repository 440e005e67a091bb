"""The command line: parse, call mule.commands, show. Commands are imported when they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import mule
from mule.cli.compare_verb import compare
from mule.cli.convert_verb import convert
from mule.cli.data_verbs import data_app
from mule.cli.doctor_verb import doctor
from mule.cli.eval_verb import evaluate
from mule.cli.export_verbs import export, push, verify
from mule.cli.imatrix_option import ExportCommand
from mule.cli.lab_verbs import lab_app
from mule.cli.perform import DEBUG, PLAIN, Base, Json, Result, perform, tabled
from mule.cli.plan_verb import plan
from mule.cli.recipe_verbs import recipe_app
from mule.cli.runs_verbs import runs_app
from mule.cli.talk_verbs import chat, serve
from mule.cli.train_verb import train
from mule.cli.ui_verb import ui

_HELP = "Carry a small language model through its whole life, and prove every step."

app = typer.Typer(help=_HELP, pretty_exceptions_enable=False, **PLAIN)
app.add_typer(data_app, name="data")
app.add_typer(lab_app, name="lab")
app.add_typer(runs_app, name="runs")
app.add_typer(recipe_app, name="recipe")


def main() -> None:
    """The entry point. `--debug` may stand anywhere."""
    app(args=[word for word in sys.argv[1:] if word != DEBUG], prog_name="mule")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mule {mule.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks of errors.")] = False,
) -> None:
    """Options before the command; both act where they are parsed."""


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of data and training.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A smaller one, to see it run.")] = False,
    as_json: Json = False,
) -> None:
    """Carry a model through its whole life on data that comes with Mule."""

    def work() -> Result:
        from mule.commands import demo as command

        return command.run(seed=seed, folder=folder, fast=fast)

    perform(work, as_json=as_json, show=tabled("show_demo"))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The folder to write to.")] = Path(),
    model: Annotated[
        str | None, typer.Option(help="The model of the recipe: a hub id, a folder or a run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an example data folder and recipe."""

    def work() -> Result:
        from mule.commands import init as command

        return command.run(folder, model=model)

    perform(work, as_json=as_json)


app.command()(train)
app.command()(plan)
app.command()(doctor)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The run or folder of an adapter.")],
    *,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    base: Base = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Type of the merged weights. Default: the base's."),
    ] = None,
    onto: Annotated[
        Literal["quantized", "original"] | None,
        typer.Option(
            help="Of an adapter of QLoRA: the base it was trained on, 4 bits dequantised (default), "
            "or the base as it is."
        ),
    ] = None,
    tokenizer: Annotated[
        Literal["base", "adapter"] | None,
        typer.Option(help="Whose tokenizer and template to take where they differ."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that was merged before.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put an adapter into its base model, and check that both answer alike."""

    def work() -> Result:
        from mule.commands import merge as command

        return command.run(
            adapter,
            out=out,
            base=base,
            dtype=dtype,
            onto=onto,
            tokenizer=tokenizer,
            overwrite=overwrite,
        )

    perform(work, as_json=as_json, show=tabled("show_merge"))


app.command()(convert)


app.command(cls=ExportCommand)(export)
app.command()(verify)
app.command()(push)


app.command("eval")(evaluate)
app.command()(compare)
app.command()(chat)
app.command()(serve)
app.command()(ui)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="train, compile, merge, kv, all, or report to show what was measured before."
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [key=value]...",
            help="Settings to measure with, as for train: model.size=10m. For merge: the adapter. "
            "For kv: a model, or a shape such as 125m.",
            show_default=False,
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="For kv, of a shape: mha, gqa, gqa-N, mqa; several by commas."),
    ] = None,
    context: Annotated[str | None, typer.Option(help="For kv: tokens, as 128,1024.")] = None,
    batch: Annotated[str | None, typer.Option(help="For kv: texts at once, as 1,8.")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed on this machine, and keep the result below bench/results."""

    def work() -> Result:
        from mule.commands import bench as command

        options = {"attention": attention, "context": context, "batch": batch}
        return command.run(what, command.with_options(what, words or [], options))

    perform(work, as_json=as_json)


if __name__ == "__main__":  # torchrun -m mule.cli.main
    main()
