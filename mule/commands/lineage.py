"""Where a model came from: the chain of hashes, and the held-out material of its run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import fsio

if TYPE_CHECKING:
    from mule.adapters.source import Source


def lineage_of(source: Source) -> dict[str, Any]:
    """The lineage of a source: its run's, its folder's, or nothing for a foreign model."""
    folder = source.adapter_dir or source.model_dir or source.gguf_file
    assert folder is not None
    for candidate in (folder, folder.parent):
        if (candidate / "lineage.json").is_file():
            lineage = fsio.read_json(candidate / "lineage.json")
            return lineage if "run" in lineage else {"run": str(candidate)} | lineage
    return {}


def probe_of(source: Source) -> dict[str, Any] | None:
    """Held-out texts and prompts kept by the run that `source` came from, if it is there."""
    run = lineage_of(source).get("run")
    file = Path(run) / "probe.json" if run else None
    return fsio.read_json(file) if file is not None and file.is_file() else None
