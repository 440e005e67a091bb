"""mule recipe: the recipes that come with Mule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mule.config.hints import near
from mule.config.presets import CATALOGUE, catalogue_file, preset_file, presets
from mule.errors import UserError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:g|gb|gib)?", re.IGNORECASE)
_GIB = 2**30
_TASKS = ("chat", "code")


def list_recipes(*, memory: str | None = None, task: str | None = None) -> dict[str, Any]:
    """Name, file and first comment line of each recipe; of the catalogue's, what they take here.

    With `memory` (16GB) or `task` (chat, code) only those of the catalogue that fit.
    """
    limit = _bytes_of(memory) if memory is not None else None
    if task is not None and task not in _TASKS:
        raise UserError(f"--task {task}: not a task", f"choose among {', '.join(_TASKS)}")
    rows = names_with_abouts()
    found = _catalogue({row["name"]: row for row in rows})
    known = {row["name"] for row in found["catalogue"]}
    if limit is not None:
        found["catalogue"] = [row for row in found["catalogue"] if _fits(row, limit)]
    if task is not None:
        found["catalogue"] = [row for row in found["catalogue"] if row["task"] == task]
    if memory is not None or task is not None:
        rows = []
        if not found["catalogue"]:
            raise UserError(
                f"nothing in the catalogue is for this: {_asked(memory, task)}",
                "see all of it: mule recipe list",
            )
    others = [row for row in rows if row["name"] not in known]
    first = next(iter([*found["catalogue"], *others]), None)
    return found | {"recipes": others, "next": _next(first)}


def names_with_abouts() -> list[dict[str, Any]]:
    """Every recipe that comes with Mule, with its file and its first comment line."""
    return [
        {"name": name, "about": _about(file), "file": str(file)} for name, file in presets().items()
    ]


def show(name: str) -> dict[str, Any]:
    """The text of a recipe, by its name or file; UserError names the nearest."""
    file = preset_file(name) or Path(name)
    if not file.is_file():
        match = near(name, presets())
        hint = f"did you mean `{match}`?" if match else "`mule recipe list` shows them"
        raise UserError(f"no recipe called `{name}` comes with Mule", hint)
    text = file.read_text(encoding="utf-8")
    return {"name": name, "file": str(file), "text": text, "next": f"mule train {name}"}


def _about(file: Path) -> str:
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _next(row: dict[str, Any] | None) -> str:
    return f"mule recipe show {row['name']}" if row else "mule init"


# ---------------------------------------------------------------- the catalogue


def _catalogue(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The recipes by model, with what each takes on this machine, and what the times are for."""
    from mule import fsio
    from mule.plan.catalogue import CHATS, EPOCHS, train_seconds

    file = catalogue_file(CATALOGUE)
    if file is None:
        return {"catalogue": [], "basis": ""}
    precision, peak_flops, machine = _this_machine()
    found = []
    for name, entry in fsio.read_json(file).items():
        seconds = train_seconds(entry["flops"]["value"], peak_flops, entry["gpus"])
        taken = entry["memory_bytes"][precision]
        found.append(
            rows[name]
            | {key: entry[key] for key in ("model", "task", "gpus")}
            | {key: entry[key]["value"] for key in ("parameters", "download_bytes", "q4_k_m_bytes")}
            | {"memory_bytes": taken["value"], "seconds": seconds, "time": in_words(seconds)}
            | {"basis": {key: entry[key]["basis"] for key in ("download_bytes", "q4_k_m_bytes")}}
        )
    basis = (
        f"Computed from the published shapes, in {precision}; the time is for {CHATS} chats seen "
        f"{EPOCHS} times on {machine}, within a factor of two."
    )
    return {"catalogue": sorted(found, key=lambda row: row["memory_bytes"]), "basis": basis}


def _this_machine() -> tuple[str, float, str]:
    """The arithmetic that training takes here, the peak of its matrix products, and its name."""
    from mule import calibration, machine

    if calibration.is_known():  # without torch
        known = calibration.calibration()
        return _named(known.device, known.precision, known.matmul_flops[known.precision])
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and torch.backends.mps.is_available():
        device = "mps"
    precision = "bf16" if device != "cpu" or machine.has_fast_bf16() else "fp32"
    peak = machine.matmul_peak(precision, device, machine.physical_cores())
    return _named(device, precision, peak)


def _named(device: str, precision: str, peak: float) -> tuple[str, float, str]:
    from mule import machine

    what = "this GPU" if device != "cpu" else f"these {machine.physical_cores()} cores"
    return precision, peak, f"{what} ({peak / 1e12:.2g} TFLOP/s at most)"


def _fits(row: dict[str, Any], limit_bytes: int) -> bool:
    from mule.plan.catalogue import FITS_SHARE

    return row["memory_bytes"] <= FITS_SHARE * limit_bytes


def _bytes_of(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UserError(f"--memory {text}: not a size", "give gigabytes: --memory 16GB")
    return round(float(found[1]) * _GIB)


def _asked(memory: str | None, task: str | None) -> str:
    said = [f"--memory {memory}"] if memory is not None else []
    return ", ".join([*said, f"--task {task}"] if task is not None else said)


def in_words(seconds: float) -> str:
    """About: minutes below an hour and a half, then hours, then days."""
    if seconds < 90:
        return "a minute"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.2g} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"
