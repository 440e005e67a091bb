"""Which base an adapter belongs to: SHA-256 of its weights, tokenizer and template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mule import fsio
from mule.errors import ModelError
from mule.models.folder import weight_files

_FILE = "mule_base.json"
_PARTS = {
    "weights": "weights",
    "config.json": "shape",
    "tokenizer.json": "tokenizer",
    "chat_template.jinja": "chat template",
}


def base_identity(folder: Path | str) -> dict[str, str | None]:
    """SHA-256 of each part of a base model; None for a part it does not have."""
    folder = Path(folder)
    weights = hashlib.sha256()
    for file in weight_files(folder):
        weights.update(fsio.sha256_file(file).encode())
    identity: dict[str, str | None] = {"weights": weights.hexdigest()}
    for name in list(_PARTS)[1:]:
        identity[name] = fsio.sha256_file(folder / name) if (folder / name).is_file() else None
    return identity


def save_identity(base: Path | str, identity: dict[str, str | None], folder: Path) -> None:
    """Record the base in an open adapter folder."""
    text = json.dumps({"base": str(base), "sha256": identity}, indent=2) + "\n"
    (folder / _FILE).write_text(text, encoding="utf-8")


def recorded_base(adapter: Path | str) -> str | None:
    """Where the base was when the adapter was trained, or None for a foreign adapter."""
    file = Path(adapter) / _FILE
    return fsio.read_json(file)["base"] if file.is_file() else None


def check_base(adapter: Path | str, base: Path | str) -> None:
    """ModelError naming what differs unless `base` is the model the adapter was trained on."""
    file = Path(adapter) / _FILE
    if not file.is_file():  # a foreign adapter carries no identity; shapes are still checked
        return
    record = fsio.read_json(file)
    found = base_identity(base)
    differing = [
        word for part, word in _PARTS.items() if record["sha256"].get(part) != found.get(part)
    ]
    if differing:
        raise ModelError(
            f"{adapter}: this adapter was trained on {record['base']}; "
            f"{base} differs from it in {', '.join(differing)}",
            f"give the original base: --base {record['base']}",
        )
