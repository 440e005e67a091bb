"""`mule chat`: talk to a model."""

from __future__ import annotations

from typing import Annotated

import typer

from mule.cli.perform import Base, Json, Result, perform


def chat(
    source: Annotated[str, typer.Argument(help="A run, a model folder, a hub id or a GGUF file.")],
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
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    mlx: Annotated[
        bool, typer.Option("--mlx", help="Compute with Apple's mlx-lm (extra mlx).")
    ] = False,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Talk to a model."""
    given = {name: value for name, value in locals().items() if value is not None}
    given = {name: given[name] for name in given if name not in ("source", "prompt", "as_json")}

    def work() -> Result:
        from mule.cli import talk

        return talk.run(source, prompt, given, as_json=as_json)

    perform(work, as_json=as_json, show=lambda _console, _result: None)
