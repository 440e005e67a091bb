"""Proof that the runs of a campaign differ in what their variants say, and in nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mule.config.dump import identity_values
from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.errors import CheckFailed
from mule.run import Run

# Beside the identity of a recipe: they change rounding, and what a router sees at once.
_ALSO_EQUAL = ("train.micro_batch_rows", "train.precision")
_MAKE_SPEED = ("compile", "device", "threads", "activation_checkpointing")


def check_recipes(recipes: dict[str, Recipe], *, searched: Sequence[str]) -> None:
    """CheckFailed where two runs (by name) differ beside model.* and train.seed.

    `searched` are the settings, by dotted key, of which each variant has its own.
    """
    tables = {
        name: _compared(recipe, ("train.seed", *searched)) for name, recipe in recipes.items()
    }
    first = next(iter(tables), None)
    for name, table in tables.items():
        for key, value in table.items():
            if value != tables[str(first)][key]:
                raise CheckFailed(
                    f"{first} and {name} cannot be compared: {key} is "
                    f"{tables[str(first)][key]!r} in one and {value!r} in the other",
                    "everything but the variant must be equal: remove the folder of the run that is "
                    "wrong, and run the campaign again",
                )


def check_run(run: Run, planned: Recipe, facts: dict[str, Any]) -> None:
    """CheckFailed where a run was made by another recipe, of other data or another tokenizer.

    `facts` are those of campaign.json.
    """
    made = load_recipe(run.folder / "resolved.yaml", []).recipe
    was, wanted = identity_values(made), identity_values(planned)
    wanted |= {key: _value(planned, key) for key in _ALSO_EQUAL}
    was |= {key: _value(made, key) for key in _ALSO_EQUAL}
    for key, value in wanted.items():
        if value not in (None, "auto") and was.get(key) != value:
            _refuse(run, key, was.get(key), value)
    lineage = run.read_lineage()
    if lineage.get("data") != facts["data"]["train"]["folder"]:
        _refuse(run, "its prepared data", lineage.get("data"), facts["data"]["train"]["folder"])
    if lineage.get("tokenizer") != facts["tokenizer"]:
        _refuse(run, "its tokenizer", lineage.get("tokenizer"), facts["tokenizer"])


def speed_differences(runs: list[Run]) -> list[str]:
    """Why the speeds of some runs cannot be compared, in words; their losses can."""
    seen: dict[str, dict[str, str]] = {}
    for run in runs:
        train = load_recipe(run.folder / "resolved.yaml", []).recipe.train
        lineage = run.read_lineage()
        values = {f"train.{key}": str(getattr(train, key)) for key in _MAKE_SPEED}
        values |= {"torch": str(lineage.get("torch")), "mule": str(lineage.get("mule"))}
        values["processor"] = str(lineage.get("machine", {}).get("cpu"))
        for key, value in values.items():
            seen.setdefault(key, {}).setdefault(value, run.name)
    return [
        f"{key}: " + ", ".join(f"{value} in {name}" for value, name in found.items())
        for key, found in seen.items()
        if len(found) > 1
    ]


def _compared(recipe: Recipe, may_differ: tuple[str, ...]) -> dict[str, Any]:
    values = identity_values(recipe) | {key: _value(recipe, key) for key in _ALSO_EQUAL}
    return {
        key: value
        for key, value in values.items()
        if not key.startswith("model.") and key not in may_differ
    }


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _refuse(run: Run, what: str, was: Any, wanted: Any) -> None:
    raise CheckFailed(
        f"{run.folder} was trained with {what} = {was!r}, and the campaign says {wanted!r}",
        f"put the campaign back, give it another name (name=...), or remove {run.folder} to train "
        "it anew",
    )
