"""`mule plan`: parse and call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mule.cli.perform import Json, Result, perform, split_words
from mule.cli.train_verb import Data, Model, Words, as_settings

Machine = Annotated[
    str | None,
    typer.Option(
        help="Not this machine, but one by its published figures: rtx4090x6, a100x4, m4-24gb."
    ),
]
Price = Annotated[
    str | None, typer.Option(help="Of an hour of one device, in any currency: 1.20/h.")
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Also try it: the fullest micro-batch, an evaluation, the space for checkpoints.",
    ),
]


def plan(
    words: Words = None,
    *,
    model: Model = None,
    data: Data = None,
    machine: Machine = None,
    price: Price = None,
    watts: Annotated[
        float | None, typer.Option(min=0, help="Power of the machine, for the energy.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure this machine again (about ten seconds).")
    ] = False,
    check: Check = False,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    root: Annotated[Path, typer.Option(help="The folder of the runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Will it fit, how long will it take, and what to change: before anything is trained."""
    recipe, given = split_words(words or [])
    assume = recipe is None and bool(model or data)
    overrides = as_settings(given, model, data, None) + given
    options = [("--model", model), ("--data", data)]
    typed = [word for name, value in options if value for word in (name, value)]
    typed += [*([str(recipe)] if recipe else []), *given]

    def work() -> Result:
        from mule.commands import plan as command

        found = command.run(
            recipe,
            overrides,
            root=root,
            name=name,
            machine=machine,
            price=price,
            watts=watts,
            fresh=fresh,
            assume=assume,
            typed=typed,
        )
        if check:
            from mule.commands import plan_check

            found |= plan_check.run(recipe, overrides, found, root=root, machine=machine)
        return found

    from mule.cli.render_plan import show_plan

    perform(work, as_json=as_json, show=show_plan)
