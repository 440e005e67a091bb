"""`mule data ...`: look at data before a model learns from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mule.cli.perform import PLAIN, Json, Result, perform
from mule.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

Number = TypeVar("Number", int, float)

data_app = typer.Typer(
    help="Check data, look at it, mix and split it, and make rows of it.", **PLAIN
)

_SETTINGS = "Settings such as data.format=alpaca may follow; docs/configuration.md lists them."
Words = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...|RECIPE [key=value]...",
        help=f"Files, folders, patterns or hub ids; or a recipe. {_SETTINGS}",
        show_default=False,
    ),
]
Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH... [key=value]...",
        help=f"Files, folders, patterns or hub ids. {_SETTINGS}",
        show_default=False,
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="A run, a model folder, a hub id or a tokenizer.json to read it with."
    ),
]
Out = Annotated[Path, typer.Option(help="The folder to write.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


@data_app.command()
def check(
    words: Words,
    tokenizer: TokenizerName = None,
    fix_encoding: Annotated[
        bool, typer.Option("--fix-encoding", help="Check repaired copies, and keep them.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Where they go; else beside the data.")] = None,
    places: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Rows listed of each problem, in the JSON; else 5."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is wrong with data; exit 1 if it would spoil a run."""

    def work() -> Result:
        from mule.commands import data_check as command

        if places is not None and not as_json:
            raise UserError(
                "--places has no effect without --json: the page lists the first three rows of each",
                hint=f"add --json, or leave out --places {places}",
            )
        return command.run(
            words,
            tokenizer=tokenizer,
            fix_encoding=fix_encoding,
            out=out,
            places=places or 5,
        )

    def show(console: Console, result: Result) -> None:
        from mule.cli.render_check import print_check

        print_check(console, result)

    perform(work, as_json=as_json, show=show)


@data_app.command()
def preview(
    words: Words,
    n: Annotated[int, typer.Option("--n", min=1, help="How many examples.")] = 3,
    tokenizer: TokenizerName = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page for a browser.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what the model will read and which tokens it learns."""

    def work() -> Result:
        from mule.commands import data_preview as command

        if html is not None and html.suffix not in (".html", ".htm"):
            raise UserError(f"--html {html}: not the name of a page", f"--html {html}.html")
        result = command.run(words, tokenizer=tokenizer, n=n)
        return result | _written(result, html) if html is not None else result

    def show(console: Console, result: Result) -> None:
        from mule.cli import render_data

        render_data.print_preview(console, result)

    perform(work, as_json=as_json, show=show)


@data_app.command()
def mix(
    words: Paths,
    *,
    out: Out,
    cap: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC=N", help="At most N examples of a source; repeatable."),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC=W", help="Its share beside the others'; repeatable."),
    ] = None,
    repeat: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC=K", help="Take every example of it K times; repeatable."),
    ] = None,
    max_examples: Annotated[int | None, typer.Option(help="In all, at most.")] = None,
    valid_share: Annotated[
        float, typer.Option(help="Share for valid.jsonl; 0 writes none.")
    ] = 0.05,
    seed: Seed = 0,
    near: Annotated[
        float, typer.Option(help="Similarity (Jaccard) from which two are near-duplicates.")
    ] = 0.8,
    no_near: Annotated[bool, typer.Option("--no-near", help="Keep near-duplicates.")] = False,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Evaluation data to keep out; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one data set of several, without duplicates, with a card."""

    def work() -> Result:
        from mule.commands import data_mix as command
        from mule.commands.data_inputs import data_paths

        sources, options = data_paths(words)
        return command.mix(
            sources,
            out=out,
            caps=_by_source("--cap", cap, int),
            weights=_by_source("--weight", weight, float),
            repeats=_by_source("--repeat", repeat, int),
            max_examples=max_examples,
            valid_share=valid_share,
            seed=seed,
            near=None if no_near else near,
            decontaminate=decontaminate or [],
            options=options,
        )

    perform(work, as_json=as_json, show=_show_mix)


@data_app.command()
def split(
    words: Paths,
    *,
    out: Out,
    valid_share: Annotated[float, typer.Option(help="Share for valid.jsonl.")] = 0.2,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Divide data into train.jsonl and valid.jsonl."""

    def work() -> Result:
        from mule.commands import data_mix as command
        from mule.commands.data_inputs import data_paths

        paths, options = data_paths(words)
        return command.split(paths, out=out, valid_share=valid_share, seed=seed, options=options)

    perform(work, as_json=as_json, show=_show_mix)


@data_app.command()
def prepare(words: Words, tokenizer: TokenizerName = None, as_json: Json = False) -> None:
    """Make the rows that training reads, without training."""

    def work() -> Result:
        from mule.commands import data_prepare as command

        return command.run(words, tokenizer=tokenizer)

    perform(work, as_json=as_json)


@data_app.command()
def stats(
    target: Annotated[str, typer.Argument(help="A prepared folder, a run, or a recipe.")],
    as_json: Json = False,
) -> None:
    """Verify prepared rows, and say what is in them."""

    def work() -> Result:
        from mule.commands import data_stats as command

        return command.run(target)

    def show(console: Console, result: Result) -> None:
        from mule.cli import render_data

        render_data.print_stats(console, result)

    perform(work, as_json=as_json, show=show)


def _show_mix(console: Console, result: Result) -> None:
    from mule.cli.render_mix import print_mix

    print_mix(console, result)


def _written(result: Result, file: Path) -> Result:
    from mule import fsio
    from mule.cli.data_page import page

    fsio.write_text(file, page(result))
    return {"html": file}


def _by_source(
    option: str, words: Sequence[str] | None, kind: Callable[[str], Number]
) -> dict[str, Number]:
    """The numbers of `SRC=NUMBER` words, by source; a source may hold an equals sign itself."""
    numbers: dict[str, Number] = {}
    for word in words or ():
        source, equals, text = word.rpartition("=")
        if not equals or not source:
            raise UserError(
                f"{option} {word}: a source and a number are needed",
                f"{option} {'data.jsonl' if equals else word}=2",
            )
        if source in numbers:
            raise UserError(f"{option}: {source} is given twice", "leave out one of them")
        try:
            numbers[source] = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(
                f"{option} {word}: `{text}` is not {what}", f"{option} {source}=2"
            ) from None
    return numbers
