"""`mule chat` and `mule serve`: talk to a model, or let programs do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mule.cli.perform import Base, Json, Result, perform


def chat(
    sources: Annotated[
        list[str],
        typer.Argument(help="Runs, model folders, hub ids or GGUF files; several side by side."),
    ],
    *,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One question, then leave.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; 0.7 if not given.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Of so many best tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of the best that make up this share.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Of those this likely beside the best; 0.05 if not given."),
    ] = None,
    repeat_penalty: Annotated[
        float | None, typer.Option(min=0, help="Above 1, repeating becomes less likely.")
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(min=-2, max=2, help="Above 0, tokens of the answer become less likely."),
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(min=-2, max=2, help="The same, for each time they are there.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the conversation and its answer together.")
    ] = None,
    mlx: Annotated[
        bool, typer.Option("--mlx", help="Compute with Apple's mlx-lm (extra mlx).")
    ] = False,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Talk to a model, or to several side by side."""
    given = {name: value for name, value in locals().items() if value is not None}
    given = {name: given[name] for name in given if name not in ("sources", "prompt", "as_json")}

    def work() -> Result:
        from mule.cli import talk

        return talk.run(sources, prompt, given, as_json=as_json)

    perform(work, as_json=as_json, show=lambda _console, _result: None)


def serve(
    sources: Annotated[
        list[str], typer.Argument(help="Runs, model folders, hub ids or GGUF files.")
    ],
    *,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 8080,
    max_rows: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Answers computed together.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt and its answer together.")
    ] = None,
    queue: Annotated[
        int | None, typer.Option(min=0, max=10_000, help="Answers that may wait; 64 if not given.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="What clients call a model; once for each.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name this machine is called by; repeatable.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="The file of the token; made if there is none.")
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Answer OpenAI's chat and completion requests over HTTP."""

    def work() -> Result:
        from mule.cli import serving
        from mule.commands import serve as command

        return command.run(
            sources,
            address=command.Address(host, port, allow_host or (), token_file),
            room=command.Room(context, max_rows, queue),
            names=name or (),
            base=base,
            on_start=lambda started: serving.show_started(started, as_json=as_json),
        )

    perform(work, as_json=as_json, show=lambda _console, _result: None)
