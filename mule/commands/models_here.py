"""What lies in the working folder that can be talked to or exported: runs, folders, GGUF files.

Told from names and sizes alone, so that a page can list hundreds; who loads one checks it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mule import fsio
from mule.commands.export import EXPORTS
from mule.commands.export_series import FULL_TYPE_IN_NAME
from mule.errors import MuleError
from mule.run import RUNS, Run
from mule.run import list_runs as runs_in

KINDS = {
    "run": "a trained model",
    "adapter": "an adapter on its base",
    "merged": "an adapter merged into its base",
    "folder": "a model folder",
    "base": "the base of a run",
    "gguf": "a GGUF file",
}
_ADAPTER = "adapter_config.json"
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors")
_FORMS = {
    "run": ("gguf", "hf"),
    "adapter": ("gguf", "adapter", "hf", "merge"),
    "merged": ("gguf", "hf"),
    "folder": ("gguf", "hf"),
    "base": ("gguf", "hf"),
}


def list_models(runs: Path = RUNS) -> dict[str, Any]:
    """Each by its `name`, as every verb takes it; what it is, its size, and how it can be exported.

    `load_bytes` is what is read to run it: of an adapter its base as well, if that is here.
    """
    rows = [*_runs(runs), *_folders(runs), *_gguf_files()]
    known = {Path(row["name"]).resolve() for row in rows}
    for base in dict.fromkeys(row["base"] for row in rows if row["base"]):
        folder = Path(base).resolve()
        if not known & {folder, folder.parent}:  # or a checkpoint of a run that is known
            rows.append(_row(base, _title(Path(base)), "base", Path(base)))
    order = list(KINDS)
    rows.sort(key=lambda row: (_is_of_another_life(row["name"]), order.index(row["kind"])))
    following = f"mule chat {rows[0]['name']}" if rows else "mule demo"
    return {"models": rows, "kinds": KINDS, "next": following}


def _runs(runs: Path) -> Iterator[dict[str, Any]]:
    """Those of `runs`, and of folders that hold a life of their own, as `mule demo` makes one."""
    others = (place for place in sorted(Path().glob("[!.]*/runs")) if place != runs)
    for place in (runs, *others):
        for run in runs_in(place):
            folder = _newest(run)
            if folder is None:
                continue
            kind = "adapter" if (folder / _ADAPTER).is_file() else "run"
            title = run.name if place == runs else f"{place.parent.name} {run.name}"
            yield _row(str(run.folder), title, kind, folder) | {"state": run.state()}


def _is_of_another_life(name: str) -> bool:
    """Below the runs or exports of a folder such as demo/: what lies here itself comes first."""
    return Path(name).parts[1:2] in ((RUNS.name,), (EXPORTS.name,))


def _newest(run: Run) -> Path | None:
    """The folder of the newest checkpoint, without a look into its files."""
    checkpoints = run.checkpoints()
    return checkpoints[-1][1] if checkpoints else None


def _folders(runs: Path) -> Iterator[dict[str, Any]]:
    """What was merged or written for transformers, and model folders that lie here or in models/."""
    for folder in sorted(EXPORTS.glob("*/merged")):
        if _is_model(folder):
            yield _row(str(folder), f"{folder.parent.name} (merged)", "merged", folder)
    own = {EXPORTS.resolve(), runs.resolve()}
    places = [*EXPORTS.glob("*/hf"), *Path().glob("[!.]*"), *Path("models").glob("*")]
    for folder in sorted(places):
        if folder.is_dir() and folder.resolve() not in own and _is_model(folder):
            kind = "adapter" if (folder / _ADAPTER).is_file() else "folder"
            yield _row(str(folder), str(folder), kind, folder)


def _is_model(folder: Path) -> bool:
    named = any((folder / name).is_file() for name in ("config.json", _ADAPTER))
    return named and _weight_bytes(folder) > 0


def _gguf_files() -> Iterator[dict[str, Any]]:
    """Those that run alone: an adapter's lie in a folder of their own."""
    from mule.export.imatrix_file import FILE_NAME

    here = ("*.gguf", "[!.]*/exports/*.gguf", "[!.]*/exports/*/*.gguf")
    found = (file for pattern in here for file in Path().glob(pattern))
    for file in sorted([*EXPORTS.glob("*/*.gguf"), *found]):
        if file.name != FILE_NAME and not file.name.startswith("."):
            size = file.stat().st_size
            yield {
                "name": str(file),
                "title": file.stem,
                "kind": "gguf",
                "state": None,
                "size_bytes": size,
                "load_bytes": size,
                "base": None,
                "forms": ["gguf"] if FULL_TYPE_IN_NAME.search(file.stem) else [],
            }


def _row(name: str, title: str, kind: str, folder: Path) -> dict[str, Any]:
    size, base = _weight_bytes(folder), _base_of(folder)
    own_base = _weights_of(base) if base is not None and kind == "adapter" else None
    return {
        "name": name,
        "title": title,
        "kind": kind,
        "state": None,
        "size_bytes": size,
        "load_bytes": size + (_weight_bytes(own_base) if own_base else 0),
        "base": _shown(base) if base else None,
        "forms": list(_FORMS[kind]),
    }


def _weights_of(folder: Path) -> Path:
    """Of a run its newest checkpoint; any other folder is meant itself."""
    is_run = (folder / "recipe.yaml").is_file()
    return (_newest(Run(folder)) if is_run else None) or folder


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for name in _WEIGHTS for file in folder.glob(name))


def _base_of(folder: Path) -> Path | None:
    """The folder of what it was trained from, if that is on this machine."""
    from mule.export.about import base_folder

    for place in (folder, folder.parent):
        file = place / "lineage.json"
        if file.is_file():
            try:
                lineage = fsio.read_json(file)
            except MuleError:
                return None  # whoever loads it says what is damaged
            found = base_folder(lineage) if isinstance(lineage, dict) else None
            return found if found is not None and _is_model(_weights_of(found)) else None
    return None


def _shown(folder: Path) -> str:
    """As a path from here where it lies below the working folder."""
    whole = Path(os.path.abspath(folder))
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(folder)


def _title(folder: Path) -> str:
    from mule.hub.repo import address_of

    address = address_of(folder.resolve())
    return address[0] if address else folder.name
