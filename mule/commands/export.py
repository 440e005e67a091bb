"""`mule export`: a model becomes GGUF files, with what Ollama needs beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_DEFAULT_TYPES = ["q8_0", "q4_k_m"]


def run(source: str, *, types: list[str] | None = None, out: Path | None = None) -> dict[str, Any]:
    """Write one GGUF file for each type; an adapter is merged first."""
    from mule import fsio, progress
    from mule.adapters.source import find_source
    from mule.commands.lineage import lineage_of
    from mule.errors import UserError
    from mule.export.gguf import write_gguf
    from mule.export.merge import merge_adapter
    from mule.export.ollama import write_modelfile

    found = find_source(source)
    if found.gguf_file is not None:
        raise UserError(f"{source} is a GGUF file already", "export the run or folder it came from")
    assert found.model_dir is not None
    merged = found.model_dir.name == "merged"
    name = found.model_dir.parent.name if merged else found.name
    folder = out or Path("exports") / name
    lineage = lineage_of(found)
    model_dir = found.model_dir
    if found.adapter_dir is not None:
        model_dir = folder / "merged"
        progress.note(f"{source} is an adapter: merging it into {model_dir} first")
        merge_adapter(found, model_dir, lineage)
    files = []
    for type_name in types or _DEFAULT_TYPES:
        file = folder / f"{name}-{type_name.upper()}.gguf"
        report = write_gguf(model_dir, file, type_name, metadata={"name": name})
        files.append(report.as_dict())
    modelfile = write_modelfile(folder, model_dir, Path(files[-1]["file"]).name)
    fsio.write_json(
        folder / "export.json",
        {"source": str(model_dir), "lineage": lineage, "files": files},
    )
    return {
        "folder": str(folder),
        "files": files,
        "modelfile": str(modelfile),
        "next": f"mule verify {folder}",
    }
