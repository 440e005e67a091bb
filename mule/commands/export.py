"""`mule export`: a model becomes files for other programs, with what they need beside them.

GGUF files here, an adapter alone in export_adapter.py, a folder for transformers in export_hf.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError

if TYPE_CHECKING:
    from mule.adapters.source import Source
    from mule.export.about import About

# Ollama reserves memory for the whole of it at once: 128k tokens of an 8B model take 16 GB.
MAX_CONTEXT = 8192
EXPORTS = Path("exports")


# What each form can use of what the command line may give.
_OPTIONS = {
    "--types": ("types", "out", "base", "system", "author", "imatrix", "no_master"),
    "--adapter-only": ("types", "out", "base", "base_gguf", "system", "author"),
    "--hf": ("out", "base", "dtype", "shard_size", "author"),
}


def run_as(form: str, source: str, given: dict[str, Any]) -> dict[str, Any]:
    """The export of this form, a key of _OPTIONS; UserError for what has no effect on it."""
    from mule.commands import export_adapter, export_hf

    chosen = {name: value for name, value in given.items() if value is not None}
    for name in sorted(chosen.keys() - set(_OPTIONS[form])):
        ways = {other: f"with {other}" for other in _OPTIONS} | {"--types": f"without {form}"}
        forms = [ways[other] for other, names in _OPTIONS.items() if name in names]
        raise UserError(
            f"--{name.replace('_', '-')} has no effect "
            f"{'on GGUF files of a model' if form == '--types' else 'with ' + form}",
            f"leave it away, or give it {' or '.join(forms)}",
        )
    runs: dict[str, Any] = {
        "--types": run,
        "--adapter-only": export_adapter.run,
        "--hf": export_hf.run,
    }
    return runs[form](source, **chosen)


def run(
    source: str,
    *,
    types: list[str] | None = None,
    out: Path | None = None,
    name: str | None = None,
    base: str | None = None,
    system: str | None = None,
    author: str | None = None,
    imatrix: str | None = None,
    no_master: bool = False,
) -> dict[str, Any]:
    """Write one GGUF file for each type; an adapter is merged first.

    `imatrix` names the rows of an importance matrix (commands/importance.py).
    """
    from mule.adapters.identity import base_identity
    from mule.commands.export_series import described, from_file, refuse_for_file
    from mule.commands.importance import importance_for
    from mule.commands.lineage import lineage_of, probe_of
    from mule.export.about import about
    from mule.export.series import Target, check_types, write_series

    if source.endswith(".gguf"):
        refuse_for_file(name=name, base=base, system=system, author=author)
        return from_file(Path(source), types=types, out=out, imatrix=imatrix, no_master=no_master)
    found = source_to_export(source, base)
    name = name or name_of(found)
    folder = out or EXPORTS / name
    lineage = lineage_of(found)
    types = types or _recipe_types(lineage)
    check_types(types, weighed=imatrix is not None)
    known = about(name, found, lineage, author=author)
    model_dir = _plain_model(found, folder, lineage)
    weights = base_identity(model_dir)["weights"] or ""
    importance = None
    if imatrix is not None:
        importance = importance_for(imatrix, model_dir, lineage, probe_of(found))
    target = Target(folder, name, importance)
    series = write_series(
        model_dir, target, types, metadata=known.metadata(weights), keep_master=not no_master
    )
    made = described(series, target)
    beside = _finish(folder, known, model_dir, made, weights, system)
    return {
        "folder": str(folder),
        **{key: made[key] for key in ("files", "master", "imatrix")},
        "modelfile": str(folder / "Modelfile"),
        **{key: beside[key] for key in ("notes", "ollama", "docker")},
        "next": f"mule verify {folder}",
    }


def _finish(
    folder: Path,
    known: About,
    model_dir: Path,
    made: dict[str, Any],
    weights: str,
    system: str | None,
) -> dict[str, Any]:
    """Put Modelfile, licence, account, card and sums beside the files that were made."""
    from mule.export.record import add_files, new_record, write_record

    last = made["files"][-1]
    num_ctx = min(last["exact_context"], MAX_CONTEXT)
    beside = write_beside(folder, known, model_dir, last["file"], num_ctx=num_ctx, system=system)
    record = new_record("gguf", folder, model_dir, known, weights)
    record |= {"command_name": beside["command_name"], "num_ctx": num_ctx}
    if made["imatrix"]:
        record["imatrix"] = made["imatrix"]
        beside["written"].append(made["imatrix"]["file"])
    add_files(folder, record, made["entries"])
    write_record(folder, record, beside["written"])
    return beside


def source_to_export(source: str, base: str | None) -> Source:
    """What `source` names; UserError for a GGUF file, which is exported already."""
    from mule.adapters.source import find_source

    found = find_source(source, base=base)
    if found.gguf_file is not None:
        raise UserError(f"{source} is a GGUF file already", "export the run or folder it came from")
    return found


def name_of(source: Source) -> str:
    """What an export is called: after the run, not after the folder that `mule merge` made of it."""
    assert source.model_dir is not None
    merged = source.model_dir.name == "merged"
    return source.model_dir.parent.name if merged else source.name


def write_beside(
    folder: Path,
    known: About,
    tokenizer_dir: Path,
    file: str,
    *,
    num_ctx: int,
    system: str | None = None,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Licence files, Modelfile, and the commands for Ollama and Docker, for a GGUF file.

    With an `adapter`, by its path from `folder`, `file` is the way to that of its base.
    """
    from mule.export.ollama import (
        MODELFILE,
        OllamaModel,
        command_name,
        docker_commands,
        ollama_commands,
        write_modelfile,
    )
    from mule.tokenizer import Tokenizer

    licences = copy_licences(folder, known)
    text = licences[0].read_text(encoding="utf-8", errors="replace") if licences else known.licence
    model = OllamaModel(
        base=file if adapter else f"./{Path(file).name}",
        num_ctx=num_ctx,
        system=system,
        adapter=adapter,
        licence=text,
    )
    notes = write_modelfile(folder, model, Tokenizer.load(tokenizer_dir))
    licence = licences[0] if licences else None
    return {
        "written": [MODELFILE],
        "notes": notes,
        "command_name": command_name(known.name),
        "ollama": ollama_commands(folder, known.name),
        "docker": docker_commands(file, known.name, num_ctx=num_ctx, licence=licence),
    }


def copy_licences(folder: Path, known: About) -> list[Path]:
    """Put the licence files of the base beside what is exported, unless they are there."""
    from mule import fsio

    copied = []
    for file in known.licence_files:
        place = folder / file.name
        if place.resolve() != file.resolve():
            with fsio.atomic_file(place) as out:
                out.write(file.read_bytes())
        copied.append(place)
    return copied


def _plain_model(found: Source, folder: Path, lineage: dict[str, Any]) -> Path:
    """The folder of the model itself; an adapter is merged into one below `folder`."""
    from mule import progress
    from mule.commands.lineage import probe_of
    from mule.export.merge import merge_adapter

    assert found.model_dir is not None
    if found.adapter_dir is None:
        return found.model_dir
    model_dir = folder / "merged"
    progress.note(f"{found.name} is an adapter: merging it into {model_dir} first")
    merge_adapter(found, model_dir, lineage, sample=probe_of(found), overwrite=True)
    return model_dir


def _recipe_types(lineage: dict[str, Any]) -> list[str]:
    """The types that the run's recipe asks for; the defaults for a model without a run."""
    from mule.config.load import load_recipe
    from mule.config.schema import ExportSection

    file = Path(lineage.get("run", "")) / "resolved.yaml"
    section = load_recipe(file, []).recipe.export if file.is_file() else ExportSection()
    return list(section.types)
