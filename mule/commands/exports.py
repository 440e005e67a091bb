"""What was exported: the folders, their files, what `mule verify` found, and how to run them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mule.commands.export import EXPORTS
from mule.errors import MuleError, UserError

_BESIDE = ("adapter", "hf")  # folders of an export that are exports of their own


def list_exports() -> dict[str, Any]:
    """One entry for each folder below `exports`, the one written last first."""
    rows = []
    for folder in _folders():
        record = _record(folder)
        files = _files(folder, record["told"])
        rows.append(
            {
                "export": str(folder),
                "kind": record["told"].get("kind", "gguf"),
                "num_files": len(files),
                "size_bytes": sum(file["size_bytes"] for file in files),
                "state": _state(files),
                "problem": record["problem"],
                "written_at": max(
                    ((folder / file["file"]).stat().st_mtime for file in files), default=None
                ),
            }
        )
    rows.sort(key=lambda row: row["written_at"] or 0, reverse=True)
    following = f"mule verify {rows[0]['export']}" if rows else "mule export RUN"
    return {"exports": rows, "next": following}


def show(export: str) -> dict[str, Any]:
    """Everything about one of them; UserError for a folder that is none."""
    folder = Path(export)
    if folder not in _folders():
        raise UserError(f"{export}: no export there", "mule export RUN writes one")
    record = _record(folder)
    told, files = record["told"], _files(folder, record["told"])
    kind = told.get("kind", "gguf")
    names = ("name", "base", "licence", "author", "source", "imatrix")
    return {
        "export": export,
        "kind": kind,
        "state": _state(files),
        "problem": record["problem"],
        **{name: told.get(name) for name in names},
        "files": files,
        "notes": _notes(files),
        "quality": _quality(files),
        "commands": _commands(folder, told, files),
        "next": _following(export, kind, files),
    }


def _folders() -> list[Path]:
    found = []
    for folder in sorted(EXPORTS.glob("[!.]*")):
        places = (folder, *(folder / name for name in _BESIDE))
        found += [place for place in places if _holds_export(place)]
    return found


def _holds_export(folder: Path) -> bool:
    from mule.export.record import RECORD

    return (folder / RECORD).is_file() or any(folder.glob("*.gguf"))


def _record(folder: Path) -> dict[str, Any]:
    """The folder's account; `problem` where it is damaged."""
    from mule.export.record import read_record

    try:
        return {"told": read_record(folder) or {}, "problem": None}
    except MuleError as error:
        return {"told": {}, "problem": {"message": error.message, "hint": error.hint}}


def _files(folder: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of the account that are there, then GGUF files that are in none."""
    from mule.export.imatrix_file import FILE_NAME

    known = [entry for entry in record.get("files", []) if _is_there(folder, entry)]
    names = {entry["file"] for entry in known}
    found = [{"check": None, "bits_per_weight": None, "notes": []} | dict(entry) for entry in known]
    for file in sorted(folder.glob("*.gguf")):
        if file.name not in {*names, FILE_NAME}:
            entry = {"file": file.name, "type": None, "size_bytes": file.stat().st_size}
            found.append(entry | {"check": None, "bits_per_weight": None, "notes": []})
    return found


def _is_there(folder: Path, entry: Any) -> bool:
    """Whether an entry names a file of this very folder."""
    name = entry.get("file") if isinstance(entry, dict) else None
    if not isinstance(name, str) or "size_bytes" not in entry:
        return False
    return Path(name).name == name and (folder / name).is_file()


def _state(files: list[dict[str, Any]]) -> str:
    """failed where one file is beyond a limit, verified where all were found good."""
    checks = [file["check"] for file in files]
    if any(check is not None and not check["ok"] for check in checks):
        return "failed"
    return "verified" if checks and all(checks) else "not verified"


def _notes(files: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What is to be known, each with the files that it is true of."""
    found: dict[str, list[str]] = {}
    for file in files:
        for note in file["notes"]:
            found.setdefault(note, []).append(file["file"])
    return found


def _quality(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Size against what was measured, of every file that was run beside its model."""
    rows = []
    for file in files:
        check = file["check"] or {}
        if check.get("kl_mean") is not None and check.get("ppl") is not None:
            figures = {name: check[name] for name in ("kl_mean", "top1", "ppl", "ppl_reference")}
            rows.append({"type": file["type"], "size_bytes": file["size_bytes"], **figures})
    return rows


def _commands(
    folder: Path, record: Mapping[str, Any], files: list[dict[str, Any]]
) -> list[dict[str, str]]:
    """What to type next, by the program it is for."""
    return [
        {"program": program, "file": file, "command": command}
        for program, file, command in _lines(folder, record, files)
    ]


def _lines(
    folder: Path, record: Mapping[str, Any], files: list[dict[str, Any]]
) -> Iterator[tuple[str, str, str]]:
    from mule.export.ollama import MODELFILE, docker_commands, ollama_commands

    kind, name = record.get("kind", "gguf"), record.get("command_name")
    if name and (folder / MODELFILE).is_file():
        for line in ollama_commands(folder, name):
            yield "Ollama", MODELFILE, line
    if kind != "gguf":
        return
    licences = [folder / file for file in record.get("licence_files", ())]
    licence = next((each for each in licences if each.is_file()), None)
    run = ""
    for file in files if name else ():
        place, num_ctx = folder / file["file"], record["num_ctx"]
        package, run = docker_commands(place, str(name), num_ctx=num_ctx, licence=licence)
        yield "Docker Model Runner", file["file"], package
    if run:
        yield "Docker Model Runner", "", run
    for file in files:
        yield "Mule", file["file"], f"mule chat {shlex.quote(str(folder / file['file']))}"


def _following(export: str, kind: str, files: list[dict[str, Any]]) -> str:
    if kind == "gguf" and _state(files) == "not verified":
        return f"mule verify {export}"
    return f"mule push {export} ORG/NAME"
