"""`mule export`, the GGUF files themselves: from a model's folder, or from the kept master."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError

if TYPE_CHECKING:
    from mule.export.gguf_file import GgufReport
    from mule.export.imatrix_file import ImportanceMatrix
    from mule.export.series import Series, Target

FULL_TYPE_IN_NAME = re.compile(r"-(f32|f16|bf16)$", re.IGNORECASE)
_FULL = ("f32", "f16", "bf16")


def described(series: Series, target: Target) -> dict[str, Any]:
    """The `files` that were asked for, with their hashes, the `master` beside them, and `entries`.

    `entries` are those of export.json: files by their names in the folder, each one once.
    """
    rows = {report.file: _hashed(report) for report in series.files}
    master = series.master
    if master is not None and master.file not in rows:
        rows = {master.file: _hashed(master)} | rows
    made_from = Path(master.file).name if master is not None else None
    entries = []
    for row in rows.values():
        entry = row | {"file": Path(row["file"]).name}
        if made_from and row["type"] not in _FULL:
            entry["made_from"] = made_from
        entries.append(entry)
    return {
        "files": [rows[report.file] for report in series.files],
        "master": rows[master.file] if master is not None else None,
        "entries": entries,
        "imatrix": importance_entry(target.importance),
    }


def importance_entry(importance: ImportanceMatrix | None) -> dict[str, Any] | None:
    """What export.json says of an importance matrix; `dataset` has the hash of its rows."""
    from mule.export.imatrix_file import FILE_NAME

    if importance is None:
        return None
    return {
        "file": FILE_NAME,
        "dataset": importance.dataset,
        "num_tokens": importance.num_tokens,
        "num_matrices": len(importance.squares),
    }


def from_file(
    source: Path,
    *,
    types: list[str] | None,
    out: Path | None,
    imatrix: str | None,
    no_master: bool = False,
) -> dict[str, Any]:
    """Further types of a GGUF file that is not quantised: `mule export MODEL-F16.gguf --types ...`."""
    from mule.export.from_gguf import read_master
    from mule.export.record import RECORD, add_files, read_record, write_record
    from mule.export.series import Target, check_types, write_series_from

    if not types:
        raise UserError(
            f"{source} is a GGUF file already", "name what to make of it: --types q4_k_m"
        )
    if no_master:
        raise UserError(
            f"--no-master has no effect: {source} is the master", "leave it out; the file stays"
        )
    check_types(types, weighed=imatrix is not None)
    read_master(source)
    folder = out or source.parent
    record = read_record(source.parent)
    entry = next((row for row in (record or {}).get("files", []) if row["file"] == source.name), {})
    importance = _importance(source, record, imatrix) if imatrix is not None else None
    target = Target(folder, FULL_TYPE_IN_NAME.sub("", source.stem), importance)
    if (own := [t for t in types if target.file(t).resolve() == source.resolve()]) != []:
        raise UserError(
            f"{source} is the {own[0]} file itself", "name other types, or another --out"
        )
    series = write_series_from(source, target, types, exact_context=entry.get("exact_context"))
    found = described(series, target)
    if record is not None and folder.resolve() == source.parent.resolve():
        entries = [row | {"made_from": source.name} for row in found["entries"]]
        add_files(folder, record, entries)
        others = [found["imatrix"]["file"]] if found["imatrix"] else []
        write_record(folder, record | ({"imatrix": found["imatrix"]} if others else {}), others)
    known = record is not None and (folder / RECORD).is_file()
    check = folder if known else f"{series.files[-1].file} --against RUN_OR_FOLDER"
    return {"folder": str(folder), "files": found["files"], "next": f"mule verify {check}"}


def refuse_for_file(**given: str | None) -> None:
    """Raises UserError for what has no effect on a GGUF file that others are made of."""
    if names := [f"--{name}" for name, value in given.items() if value is not None]:
        raise UserError(
            f"{names[0]} has no effect: the entries of a GGUF file are copied as they are",
            "leave it out, or export from the run: mule export RUN",
        )


def _importance(source: Path, record: dict[str, Any] | None, given: str) -> ImportanceMatrix:
    """The matrix for a GGUF file; our own is computed with the folder that the file came from."""
    from mule.adapters.source import find_source
    from mule.commands.importance import importance_for
    from mule.commands.lineage import lineage_of, probe_of
    from mule.export.imatrix_file import read_imatrix
    from mule.export.record import source_of

    if given.endswith(".gguf"):
        return read_imatrix(Path(given))
    name = source_of(source.parent, record)
    found = find_source(name) if name is not None else None
    if found is None or found.model_dir is None:
        raise UserError(
            f"an importance matrix is computed with the model's folder, and nothing says where "
            f"{source} was written from",
            "export from the run: mule export RUN --types TYPE --imatrix; or give a matrix that "
            "was written before: --imatrix imatrix.gguf",
        )
    return importance_for(given, found.model_dir, lineage_of(found), probe_of(found))


def _hashed(report: GgufReport) -> dict[str, Any]:
    from mule import fsio

    return report.as_dict() | {"sha256": fsio.sha256_file(report.file)}
