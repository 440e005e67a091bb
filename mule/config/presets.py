"""The recipes that come with Mule."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")  # installed, or in a checkout
MODELS, CATALOGUE = "models.json", "catalogue.json"


def presets() -> dict[str, Path]:
    """Name -> file of each recipe that comes with Mule."""
    return {name: file for name, file in _files().items() if not is_campaign(file)}


def preset_file(name: str) -> Path | None:
    """The file of the recipe called `name`, with or without .yaml; None when there is none."""
    return presets().get(name.removesuffix(".yaml"))


def campaign_file(name: str) -> Path | None:
    """The file of the campaign called `name`, with or without .yaml; None when there is none."""
    file = _files().get(name.removesuffix(".yaml"))
    return file if file is not None and is_campaign(file) else None


def came_with_mule() -> set[Path]:
    """The files of all recipes and campaigns that come with Mule."""
    return {file.resolve() for file in _files().values()}


def _files() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in _FOLDERS:
        for file in sorted(folder.rglob("*.yaml")):
            name = str(file.relative_to(folder).with_suffix(""))
            found.setdefault(name, file)
    return found


def is_campaign(file: Path) -> bool:
    """A campaign has variants; a recipe has none."""
    return re.search(r"^variants:", file.read_text(encoding="utf-8"), re.MULTILINE) is not None


def catalogue_file(name: str) -> Path | None:
    """MODELS, the published shapes, or CATALOGUE, what is computed of them; None without them."""
    return next((folder / name for folder in _FOLDERS if (folder / name).is_file()), None)
