"""`mule export` and `mule verify`: a model becomes files for other programs, and they are proven."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mule.cli.perform import Base, Json, Result, perform, tabled
from mule.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console


def _table(name: str) -> Callable[[Console, Result], None]:
    """The table of that name in cli/export_tables.py, imported when it is shown."""

    def show(console: Console, result: Result) -> None:
        from mule.cli import export_tables

        getattr(export_tables, name)(console, result)

    return show


def export(
    source: Annotated[str, typer.Argument(help="A run, a model folder or a hub id.")],
    *,
    types: Annotated[
        str | None, typer.Option("--types", help="GGUF types, such as f16,q8_0,q4_k_m.")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="A LoRA alone, for a GGUF file of its base.")
    ] = False,
    hf: Annotated[
        bool, typer.Option("--hf", help="A folder that transformers opens, in place of GGUF files.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    base: Base = None,
    base_gguf: Annotated[
        Path | None, typer.Option(help="With --adapter-only: a GGUF file of the base.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="With --hf: type of the weights. Default: as they are."),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="With --hf: largest file of weights; 5GB if not given.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt of the Modelfile.")] = None,
    author: Annotated[str | None, typer.Option(help="Who made it: goes into the files.")] = None,
    imatrix: Annotated[
        str | None,
        typer.Option(
            metavar="[FILE]",
            help="Weigh rounding by an importance matrix, of the run's held-out rows or of FILE.",
        ),
    ] = None,
    no_master: Annotated[
        bool,
        typer.Option("--no-master", help="Do not keep the 16-bit file that others are made of."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write GGUF files for llama.cpp, Ollama and Docker Model Runner, or a folder for transformers."""
    chosen = [word.strip().lower() for word in types.split(",")] if types else None
    given = {"types": chosen, "base_gguf": base_gguf, "dtype": dtype, "shard_size": shard_size}
    given |= {"system": system, "author": author, "out": out, "base": base}
    given |= {"imatrix": imatrix, "no_master": no_master or None}
    form = "--adapter-only" if adapter_only else "--hf" if hf else "--types"

    def work() -> Result:
        from mule.commands import export as command

        if adapter_only and hf:
            raise UserError("--adapter-only and --hf write different things", "give one of them")
        return command.run_as(form, source, given)

    shows = {"--adapter-only": _table("show_adapter"), "--hf": _table("show_hf")}
    perform(work, as_json=as_json, show=shows.get(form, tabled("show_export")))


def push(
    folder: Annotated[Path, typer.Argument(help="An export: what `mule export` wrote.")],
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the hub.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="A new one is private.")] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Also what `mule verify` has not passed.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Upload an export to the Hugging Face hub: shows what, and asks."""

    def work() -> Result:
        from mule.cli import asking
        from mule.commands import push as command

        plan = command.plan(folder, name, private=private, unverified=unverified)
        if not yes:
            asking.agree(plan, as_json=as_json)
        return command.run(plan)

    perform(work, as_json=as_json, show=_table("show_push"))


def verify(
    gguf: Annotated[Path, typer.Argument(help="A GGUF file, or a folder of them.")],
    *,
    against: Annotated[str | None, typer.Option(help="The run or folder it was made from.")] = None,
    texts: Annotated[list[Path] | None, typer.Option("--text", help="Texts to compare on.")] = None,
    base: Base = None,
    base_gguf: Annotated[
        Path | None, typer.Option(help="Of an adapter: a GGUF file of its base.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=0, help="Held-out prompts to answer at most.")] = 50,
    as_json: Json = False,
) -> None:
    """Compare a GGUF file with the model it came from: entries, weights, and answers in llama.cpp."""
    options = {"against": against, "texts": texts, "base": base, "base_gguf": base_gguf}

    def work() -> Result:
        from mule.commands import verify as command

        return command.run(gguf, **options, prompts=prompts)

    perform(work, as_json=as_json, show=_table("show_verify"))
