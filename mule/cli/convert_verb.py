"""`mule convert`: a PyTorch checkpoint of one's own becomes a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mule.cli.perform import Json, Result, perform


def convert(
    file: Annotated[Path, typer.Argument(help="A file of torch.save: .pt, .pth, .bin.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="The model's shape where tensors do not tell it: model.num_heads=8.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    key: Annotated[
        str | None, typer.Option(help="The state dict to take, when the file holds several.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The model's config.json.")] = None,
    like: Annotated[
        str | None, typer.Option(help="A model folder, run or recipe of the same shape.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer's folder, copied into the result.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16; auto is the narrowest that holds all.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Turn a PyTorch checkpoint of your own into a model folder; no code in it is run."""

    def work() -> Result:
        from mule.commands import convert as command

        shape = command.Shape(config, like, tuple(settings or ()))
        return command.run(file, out, key=key, shape=shape, tokenizer=tokenizer, dtype=dtype)

    perform(work, as_json=as_json)
