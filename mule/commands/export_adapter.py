"""`mule export --adapter-only`: a LoRA as a GGUF file, to be used on a GGUF file of its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.commands.export import EXPORTS, MAX_CONTEXT
from mule.errors import CheckFailed, ModelError, UserError

if TYPE_CHECKING:
    from mule.adapters.source import Source
    from mule.export.about import About
    from mule.export.adapter_proof import AdapterProof

_BEST_FIRST = ("f32", "bf16", "f16", "q8_0")  # of the files of a base, for a check
_WITHOUT_FILE = "no GGUF file of its base is at hand: not checked in llama.cpp, and no Modelfile"


def run(
    source: str,
    *,
    types: list[str] | None = None,
    out: Path | None = None,
    base: str | None = None,
    base_gguf: Path | None = None,
    system: str | None = None,
    author: str | None = None,
) -> dict[str, Any]:
    """Write the adapter, and run it in llama.cpp on a file of its base if one is at hand.

    `base_gguf`: that file; else one that an export beside this one wrote. Raises CheckFailed where
    the file with the adapter is not the trained model; the files stay, to be looked at.
    """
    from mule.adapters.identity import base_identity, recorded_quantization
    from mule.commands.lineage import lineage_of
    from mule.export.about import about
    from mule.export.record import add_files, new_record, write_record

    found = _adapter(source, base)
    assert found.adapter_dir is not None and found.model_dir is not None
    folder = out or EXPORTS / found.name / "adapter"
    identity = base_identity(found.model_dir)
    on, notes = _base_file(folder, base_gguf, identity["weights"])
    if system is not None and on is None:
        raise UserError(
            "--system goes into the Modelfile, which needs a GGUF file of the base",
            f"{_write_base(found)}; then give this command again",
        )
    known = about(found.name, found, lineage_of(found), author=author)
    files = _write(found, folder, known, types or ["f32"], identity)
    proofs = [_proof(found, Path(file["file"]), on) for file in files] if on else []
    for file, proof in zip(files, proofs):
        file["check"] = proof.as_dict()
        notes += proof.notes
    quantized = recorded_quantization(found.adapter_dir)
    notes += [_of_quantized(found, quantized, proofs)] if quantized else []
    record = new_record("adapter", folder, found.adapter_dir, known, identity["weights"] or "")
    record |= {"base_identity": identity, "quantized": quantized}
    add_files(folder, record, [file | {"file": Path(file["file"]).name} for file in files])
    ollama: list[str] = []
    if on is None:
        notes.append(_WITHOUT_FILE)
    else:
        beside = _modelfile(found, known, folder, Path(files[-1]["file"]), on, system)
        ollama = beside["ollama"]
        notes += beside["notes"]
    write_record(folder, record)  # without the Modelfile, whose base lies elsewhere
    _require_proven(folder, proofs)
    return {
        "folder": str(folder),
        "files": files,
        "base_file": str(on) if on else None,
        "notes": notes,
        "ollama": ollama,
        "next": f"mule verify {folder}" if on is None else f"mule push {folder} ORG/NAME",
    }


def check(
    gguf_files: Sequence[Path],
    *,
    against: str | None = None,
    base: str | None = None,
    base_gguf: Path | None = None,
) -> dict[str, Any]:
    """`mule verify` of adapter files: each on a file of its base; `ok` is False beyond a limit."""
    from mule.adapters.identity import base_identity
    from mule.adapters.source import find_source
    from mule.export.record import read_record, record_checks, source_of

    folder = gguf_files[0].parent
    record = read_record(folder)
    named = against or source_of(folder, record)
    if named is None:
        raise UserError(
            f"{gguf_files[0]}: nothing says which adapter it was written from",
            "name it: mule verify FILE --against RUN_OR_FOLDER",
        )
    found = find_source(named, base=base)
    if found.adapter_dir is None or found.model_dir is None:
        raise UserError(
            f"{named} is no adapter, and {gguf_files[0]} is one",
            "name the run or folder of the adapter: --against RUN_OR_FOLDER",
        )
    on, notes = _base_file(folder, base_gguf, base_identity(found.model_dir)["weights"])
    if on is None:
        raise UserError(
            f"{gguf_files[0]}: an adapter runs on a GGUF file of its base, and none is at hand",
            f"{_write_base(found)}; or name one: --base-gguf FILE",
        )
    rows = [_proof(found, file, on).as_dict() for file in gguf_files]
    record_checks(folder, {row["file"]: row for row in rows})
    return {
        "ok": all(row["ok"] for row in rows),
        "against": str(found.adapter_dir),
        "adapters": rows,
        "notes": notes,
    }


def adapters_among(files: Sequence[Path], base_gguf: Path | None) -> list[Path]:
    """The files that are adapters; UserError for a base's file beside none of them."""
    from mule.export.adapter_gguf import is_adapter

    found = [file for file in files if is_adapter(file)]
    if base_gguf is not None and not found:
        raise UserError(
            f"--base-gguf is for adapters, and {files[0]} is a model", "leave --base-gguf away"
        )
    return found


def _adapter(source: str, base: str | None) -> Source:
    from mule.commands.export import source_to_export

    found = source_to_export(source, base)
    if found.adapter_dir is None:
        raise UserError(
            f"{source} is no adapter: there is nothing to write without the model",
            f"write the model: mule export {source}",
        )
    return found


def _require_proven(folder: Path, proofs: Sequence[AdapterProof]) -> None:
    for proof in proofs:
        if not proof.ok:
            raise CheckFailed(
                f"{folder / proof.file}: {proof.verdict}",
                "report this; until then merge the adapter: mule merge",
            )


def _write(
    found: Source, folder: Path, known: About, types: list[str], identity: dict[str, str | None]
) -> list[dict[str, Any]]:
    from mule import fsio
    from mule.export.adapter_gguf import write_adapter

    assert found.adapter_dir is not None and found.model_dir is not None
    metadata = known.metadata(identity["weights"] or "") | {"name": f"{found.name} (LoRA)"}
    del metadata["mule.weights"]  # those of another file
    metadata |= {f"mule.base.{part}": value for part, value in identity.items() if value}
    files = []
    for type_name in types:
        file = folder / f"{found.name}-adapter-{type_name.upper()}.gguf"
        report = write_adapter(
            found.adapter_dir, found.model_dir, file, type_name, metadata=metadata
        )
        files.append(report.as_dict() | {"sha256": fsio.sha256_file(file)})
    return files


def _proof(found: Source, file: Path, on: Path) -> AdapterProof:
    from mule.commands.lineage import probe_of
    from mule.export.adapter_proof import prove_adapter

    assert found.adapter_dir is not None and found.model_dir is not None
    return prove_adapter(file, on, found.adapter_dir, found.model_dir, sample=probe_of(found))


def _modelfile(
    found: Source, known: About, folder: Path, file: Path, on: Path, system: str | None
) -> dict[str, Any]:
    from mule.commands.export import write_beside
    from mule.export.record import way_to
    from mule.generate.gguf_header import read_header

    metadata = read_header(on).metadata
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length", MAX_CONTEXT)
    way = way_to(folder, on)
    found_there = write_beside(
        folder,
        known,
        found.tokenizer_dir,
        way or f"./{on.name}",
        num_ctx=min(context, MAX_CONTEXT),
        system=system,
        adapter=f"./{file.name}",
    )
    if way is None:
        found_there["notes"].append(f"put {on.name} beside the Modelfile")
    return found_there


# ---------------------------------------------------------------- the base's file


def _base_file(
    folder: Path, given: Path | None, weights: str | None
) -> tuple[Path | None, list[str]]:
    """A GGUF file of the base, and what is not known about it."""
    from mule.export.adapter_proof import check_base_file

    if given is not None:
        return given, check_base_file(given, weights)
    return _at_hand(folder, weights), []


def _at_hand(folder: Path, weights: str | None) -> Path | None:
    """The most exact file that an export of these weights wrote; None without one."""
    from mule.export.record import RECORD, read_record

    places = {*EXPORTS.glob(f"*/{RECORD}"), *folder.parent.glob(f"*/{RECORD}")}
    places |= set(folder.parent.parent.glob(f"*/{RECORD}"))
    files: dict[Path, str] = {}
    for place in sorted(places):
        try:
            record = read_record(place.parent) or {}
        except ModelError:
            continue  # another export's record is damaged: not this one's matter
        if weights and record.get("weights") == weights and record.get("kind") == "gguf":
            found = {place.parent / entry["file"]: entry["type"] for entry in record["files"]}
            files |= {file: kind for file, kind in found.items() if file.is_file()}
    ranks = {kind: rank for rank, kind in enumerate(_BEST_FIRST)}
    return min(files, key=lambda file: ranks.get(files[file], len(ranks)), default=None)


def _write_base(found: Source) -> str:
    from mule.export.about import public_path

    assert found.model_dir is not None
    return f"write one: mule export {public_path(str(found.model_dir))} --types f16"


def _of_quantized(found: Source, quantized: str, proofs: Sequence[AdapterProof]) -> str:
    """What it means for an adapter of QLoRA that a file holds its base as it is."""
    measured = proofs[0].from_trained if proofs else None
    far = (
        f" ({measured['kl_mean']:.2g} nats away, same best token {measured['top1']:.1%})"
        if measured
        else ""
    )
    return (
        f"it was trained on its base in 4 bits ({quantized}). A GGUF file has the base as it is, "
        f"and answers a little otherwise than what was trained{far}. For just that: "
        f"mule merge {found.name} --onto quantized, and export the result"
    )
