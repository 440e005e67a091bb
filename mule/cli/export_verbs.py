"""`mule export` and `mule verify`: a model becomes files for other programs, and they are proven."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mule.cli.perform import Base, Json, Result, perform, tabled


def export(
    source: Annotated[str, typer.Argument(help="A run, a model folder or a hub id.")],
    types: Annotated[
        str | None, typer.Option("--types", help="GGUF types, such as f16,q8_0,q4_k_m.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Write GGUF files for llama.cpp, Ollama and Docker Model Runner."""
    chosen = [word.strip().lower() for word in types.split(",")] if types else None

    def work() -> Result:
        from mule.commands import export as command

        return command.run(source, types=chosen, out=out, base=base)

    perform(work, as_json=as_json, show=tabled("show_export"))


def verify(
    gguf: Annotated[Path, typer.Argument(help="A GGUF file, or a folder of them.")],
    against: Annotated[str | None, typer.Option(help="The run or folder it was made from.")] = None,
    texts: Annotated[list[Path] | None, typer.Option("--text", help="Texts to compare on.")] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Run a GGUF file in llama.cpp and compare it with the model it came from."""

    def work() -> Result:
        from mule.commands import verify as command

        return command.run(gguf, against=against, texts=texts, base=base)

    perform(work, as_json=as_json, show=tabled("show_verify"))
