"""An export folder's own account: export.json, README.md and SHA256SUMS.

All three are made to be passed on: no path of the machine stands in them but the way from the folder
to the model it was written from, where that leads through no folder of the user's name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mule
from mule import fsio, progress
from mule.errors import ModelError
from mule.export.about import public_name
from mule.export.card import licence_links
from mule.export.export_card import card_text
from mule.hub.repo import address_of

if TYPE_CHECKING:
    from mule.export.about import About

RECORD, SUMS, CARD = "export.json", "SHA256SUMS", "README.md"
Kind = Literal["gguf", "adapter", "hf"]
Record = dict[str, Any]
_TOLD_OF_CHECK = (
    *("ok", "verdict", "runtime", "tokens_equal", "template_equal", "kl_mean", "kl_p99", "top1"),
    *("ppl", "ppl_reference", "num_prompts", "num_greedy_equal", "stops"),
)


def new_record(kind: Kind, folder: Path, model_dir: Path, known: About, weights: str) -> Record:
    """The account of an export in `folder` of the model in `model_dir`, without files yet."""
    address = known.base
    relation = "adapter" if kind == "adapter" else "quantized" if known.is_base else "finetune"
    return {
        "mule": mule.__version__,
        "kind": kind,
        "name": known.name,
        "source": way_to(folder, model_dir),
        "weights": weights,
        "licence": known.licence,
        "licence_links": next(filter(None, map(licence_links, known.ancestors)), []),
        "licence_files": [file.name for file in known.licence_files],
        "base_model": address[0] if address else None,
        "base_revision": address[1] if address else None,
        "base": known.base_text,
        "relation": relation,
        "languages": known.languages,
        "author": known.author,
        "lineage": known.public_lineage,
        "lineage_sha256": known.lineage_sha256,
        "files": [],
    }


def read_record(folder: Path) -> Record | None:
    """The account in a folder; None where there is none. ModelError when it is damaged."""
    file = folder / RECORD
    if not file.is_file():
        return None
    found = fsio.read_json(file)
    if not isinstance(found, dict) or not isinstance(found.get("files"), list):
        raise ModelError(f"{file}: this record of an export is damaged", "export again")
    return found


def source_of(folder: Path, record: Record | None) -> str | None:
    """What names the model that a folder was exported from, for mule.adapters.source; if known."""
    source = (record or {}).get("source")
    if not source or source.startswith("hf://"):
        return source or None
    path = os.path.normpath(folder / source)
    return path if Path(path).exists() else None


def add_files(folder: Path, record: Record, files: Sequence[Mapping[str, Any]]) -> None:
    """Put files into a record, after those of an earlier export of the same weights.

    A file that came out the same, byte for byte, keeps what `mule verify` found of it.
    """
    before = read_record(folder)
    names = {file["file"] for file in files}
    checks = {
        (entry["file"], entry["sha256"]): entry["check"]
        for entry in (before or {}).get("files", [])
        if "check" in entry
    }
    kept = []
    for entry in before["files"] if before else []:
        if entry["file"] in names or not (folder / entry["file"]).is_file():
            continue
        if before and before.get("weights") == record["weights"]:
            kept.append(entry)
        else:
            progress.note(
                f"{folder / entry['file']} was written from other weights: it is no part of this "
                "export any more",
                "warning",
            )
    found = [{"check": checks.get((f["file"], f["sha256"]))} | dict(f) for f in files]
    record["files"] = [*kept, *({k: v for k, v in f.items() if v is not None} for f in found)]


def write_record(
    folder: Path, record: Record, others: Sequence[str] = (), *, keep_card: bool = False
) -> None:
    """Write export.json, the card and SHA256SUMS; `others` are further files beside those listed.

    A card that was changed by hand stays as it is.
    """
    text, card = card_text(record), folder / CARD
    before = read_record(folder) or {}
    written = before.get("card_sha256")
    if keep_card:
        record["card_sha256"] = fsio.sha256_file(card)
    elif card.is_file() and written and fsio.sha256_file(card) != written:
        progress.note(f"{card} was changed by hand: it stays as it is")
        record["card_sha256"] = written
    else:
        fsio.write_text(card, text)
        record["card_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    record["others"] = sorted({*others, *before.get("others", [])})
    fsio.write_json(folder / RECORD, record)
    write_sums(folder, record)


def finish_folder(
    folder: Path, model_dir: Path, known: About, files: Sequence[Mapping[str, Any]]
) -> None:
    """Put the account beside a folder for transformers; a card that is there stays."""
    from mule.adapters.identity import base_identity  # torch, which an upload needs not

    weights = base_identity(folder)["weights"] or ""
    record = new_record("hf", folder, model_dir, known, weights)
    record["files"] = list(files)
    listed = {RECORD, SUMS, CARD, fsio.MANIFEST, *(entry["file"] for entry in files)}
    others = [file.name for file in folder.iterdir() if file.is_file()]
    others = [name for name in others if name not in listed and not name.startswith(".")]
    write_record(folder, record, others, keep_card=(folder / CARD).is_file())


def write_sums(folder: Path, record: Record) -> None:
    """SHA256SUMS of the files of an export, as `sha256sum -c` reads it."""
    sums = {entry["file"]: entry["sha256"] for entry in record["files"]}
    small = (CARD, RECORD, *record.get("others", ()), *record["licence_files"])
    for name in small:
        if name not in sums and (folder / name).is_file():
            sums[name] = fsio.sha256_file(folder / name)
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
    fsio.write_text(folder / SUMS, "".join(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by the names of the files; ModelError when one is not plainly in the folder."""
    found = {}
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if Path(name).name != name or len(digest) != 64:
            raise ModelError(f"{folder / SUMS}: not a list of files and sums", "export again")
        found[name] = digest
    return found


def record_checks(folder: Path, checks: Mapping[str, Mapping[str, Any]]) -> None:
    """Note in an export folder what was found of its files, by name; nothing in another folder.

    What was found holds for a file's bytes as they are now: its SHA-256 is taken again.
    """
    record = read_record(folder)
    if record is None:
        return
    known = {entry["file"]: entry for entry in record["files"]}
    for name, check in checks.items():
        if name in known:
            known[name]["sha256"] = fsio.sha256_file(folder / name)
            known[name]["check"] = dict(check)
    write_record(folder, record)


def note_checks(folder: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """What `mule verify` reports of the files in a folder, in its account."""
    told = {Path(report["file"]).name: report for report in reports}
    checks = {
        name: {key: report[key] for key in _TOLD_OF_CHECK if key in report}
        | {"steps": {check["name"]: check["ok"] for check in report["checks"]}}
        for name, report in told.items()
    }
    record_checks(folder, checks)


def way_to(folder: Path, model_dir: Path) -> str | None:
    """How to find the model from the folder; None where the way would tell whose machine it is."""
    if address_of(model_dir.resolve()):
        return f"hf://{public_name(str(model_dir))}"
    ways = [folder.absolute(), model_dir.absolute()]
    shared = Path(os.path.commonpath(ways))
    if shared != Path.home() and shared in Path.home().parents:
        return None
    return os.path.relpath(ways[1], ways[0])
