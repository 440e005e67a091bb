"""What a person can begin with: what lies in the folder, and the recipes that come with Mule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule.run import RUNS

_TRAINABLE = ("run", "merged", "folder", "base")  # of models: adapters and GGUF files are not


def here(runs: Path = RUNS) -> dict[str, Any]:
    """The user's own: recipes, runs, data, models and tokenizers below the working folder."""
    from mule.commands import data_found
    from mule.commands.models_here import list_models
    from mule.config.presets import is_campaign

    found = data_found.run(runs=runs)
    models = list_models(runs)["models"]
    recipes = [file for file in found["recipes"] if not is_campaign(Path(file))]
    return {
        "recipes": recipes,
        "runs": found["runs"],
        "data": [*found["folders"], *(row["file"] for row in found["files"])],
        "models": [row["name"] for row in models if row["kind"] in _TRAINABLE],
        "tokenizers": found["tokenizers"],
        "next": "mule train RECIPE" if recipes else "mule init",
    }


def of_mule() -> dict[str, Any]:
    """The recipes that come with Mule; by model, with what each takes, once this machine is measured.

    Nothing here measures or loads torch.
    """
    from mule import calibration, machine
    from mule.commands.recipes import list_recipes, names_with_abouts
    from mule.plan.catalogue import FITS_SHARE

    if not calibration.is_known():
        return {"measured": False, "catalogue": [], "basis": "", "recipes": names_with_abouts()}
    known, found = calibration.calibration(), list_recipes()
    free = known.device_bytes or machine.available_bytes()
    for row in found["catalogue"]:
        enough = row["gpus"] == 1 or known.device == "cuda"  # how many there are, torchrun tells
        row["fits"] = enough and row["memory_bytes"] <= FITS_SHARE * free
    return {"measured": True, **found}
