"""`mule export --hf`: a model as a folder that transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mule.adapters.source import Source
    from mule.export.about import About


def run(
    source: str,
    *,
    out: Path | None = None,
    base: str | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    author: str | None = None,
) -> dict[str, Any]:
    """Write weights in files of at most `shard_size`, tokenizer, template, card and sums."""
    from mule.commands.export import EXPORTS, name_of, source_to_export
    from mule.commands.lineage import lineage_of
    from mule.export.about import about
    from mule.export.hf_folder import DEFAULT_SHARD, parse_size, weight_shards
    from mule.export.record import finish_folder

    found = source_to_export(source, base)
    name = name_of(found)
    folder = out or EXPORTS / name / "hf"
    shard_bytes = parse_size(shard_size or DEFAULT_SHARD)
    known = about(name, found, lineage_of(found), author=author)
    write = _write_model if found.adapter_dir is None else _write_merged
    report = write(found, folder, known, dtype, shard_bytes)
    check = {"ok": True, "verdict": report["verdict"]}
    files = [entry | {"type": report["dtype"], "check": check} for entry in weight_shards(folder)]
    model_dir = found.adapter_dir or found.model_dir
    assert model_dir is not None
    finish_folder(folder, model_dir, known, files)
    return {
        "folder": str(folder),
        **report,
        "files": [entry["file"] for entry in files],
        "next": f"mule chat {folder}",
    }


def _write_model(
    found: Source, folder: Path, known: About, dtype: str | None, shard_bytes: int
) -> dict[str, Any]:
    from mule.commands.lineage import probe_of
    from mule.export.hf_folder import write_hf_folder

    assert found.model_dir is not None
    report = write_hf_folder(
        found.model_dir, folder, known, shard_bytes=shard_bytes, dtype=dtype, sample=probe_of(found)
    )
    verdict = f"the trained model's logits, but for rounding to {report.dtype}: within "
    verdict += f"{report.rounding + report.written:.2g}"
    return {"dtype": report.dtype, "size_bytes": report.size_bytes, "verdict": verdict}


def _write_merged(
    found: Source, folder: Path, known: About, dtype: str | None, shard_bytes: int
) -> dict[str, Any]:
    from mule.commands.lineage import probe_of
    from mule.export.hf_folder import check_place
    from mule.export.merge import merge_adapter

    check_place(folder)
    report = merge_adapter(
        found,
        folder,
        known.public_lineage,
        sample=probe_of(found),
        dtype=dtype,
        shard_bytes=shard_bytes,
        overwrite=True,
    )
    effect = report.proof["base_against_adapter"]["max_logit_difference"]
    verdict = (
        f"logits within {report.merged_against_adapter:.2g} of the adapter's on its base, which are "
        f"{effect:.2g} from the base's"
    )
    return {"dtype": report.dtype, "size_bytes": report.size_bytes, "verdict": verdict}
