"""`mule merge`: an adapter and its base become one model, proven equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run(adapter: str, *, out: Path | None = None, base: str | None = None) -> dict[str, Any]:
    """Merge `adapter` into a model folder; the report with its logit differences."""
    from mule import fsio
    from mule.adapters.source import find_source
    from mule.commands.lineage import lineage_of
    from mule.export.merge import merge_adapter

    source = find_source(adapter, base=base)
    folder = out or Path("exports") / source.name / "merged"
    if folder.exists() and not (folder / fsio.MANIFEST).exists():
        from mule.errors import UserError

        raise UserError(f"{folder} exists and is not a folder of Mule's", "choose another --out")
    report = merge_adapter(source, folder, lineage_of(source))
    return report.as_dict() | {"next": f"mule export {folder}"}
