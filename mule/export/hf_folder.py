"""A trained model as a folder for transformers and the hub, its weights streamed and proven.

An adapter's folder is made by merge.py, in the same form.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mule import fsio, locks, progress
from mule.errors import CheckFailed, UserError
from mule.export.about import About
from mule.export.merge import check_dtype, copy_config
from mule.export.merge_forms import Forms
from mule.export.merge_probe import greatest, logits_of, probe_rows
from mule.export.merge_proof import MAX_LOGIT_DIFFERENCE, check_folder, require_memory
from mule.export.merge_tokenizer import copy_tokenizer
from mule.export.merge_weights import DTYPES, plan_merge, write_merged
from mule.export.record import RECORD
from mule.models.folder import read_config
from mule.tokenizer import Tokenizer

DEFAULT_SHARD = "5GB"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG])(i?)B?", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3}
_OTHER_BYTES = 64 * 2**20  # tokenizer, card and the like


@dataclass(frozen=True)
class HfReport:
    """What was written. Of logits: `rounding` to the type changes them so far, `written` is the rest."""

    folder: str
    dtype: str
    size_bytes: int
    rounding: float
    written: float
    probe_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_size(text: str) -> int:
    """Bytes of 5GB, 500MB, 2GiB; UserError for anything else, and below a million."""
    match = _SIZE.fullmatch(text.strip())
    base = 1024 if match and match[3] else 1000
    found = int(float(match[1]) * base ** _POWERS[match[2].upper()]) if match else 0
    if found < 1_000_000:
        raise UserError(f"{text!r} is no size of a file", "write it as 5GB, 500MB or 2GiB")
    return found


def write_hf_folder(
    model_dir: Path,
    out: Path,
    known: About,
    *,
    shard_bytes: int,
    dtype: str | None = None,
    sample: Mapping[str, Any] | None = None,
) -> HfReport:
    """Write the model in `model_dir` as `out`, in its own types or in `dtype` (fp32, bf16, fp16).

    Raises UserError where `out` is something else, CheckFailed unless the folder as written gives
    the source's logits, but for rounding; nothing is left then.
    """
    check_dtype(dtype)
    check_place(out, model_dir)
    config = read_config(model_dir)
    require_memory(config)
    plan = plan_merge(
        model_dir, {}, tied=config.tie_embeddings, dtype=dtype, shard_bytes=shard_bytes
    )
    rows = probe_rows(config, Tokenizer.load(model_dir), sample)
    waiting = f"another process writes {out}: waiting for it"
    with locks.locked(out.parent / f".{out.name}.lock", lambda: progress.note(waiting)):
        fsio.remove_leftovers(out.parent, out.name)
        fsio.require_space(out.parent, plan.num_bytes + _OTHER_BYTES, "the model")
        source = Forms(model_dir, config, {})
        original = logits_of(source.base(), rows)
        expected = logits_of(source.merged(plan.dtypes()), rows) if dtype else original
        with fsio.atomic_folder(out) as folder:
            write_merged(plan, folder)
            copy_config(model_dir, folder, plan.dtype)
            copy_tokenizer(model_dir, model_dir, folder)
            for file in known.licence_files:
                shutil.copyfile(file, folder / file.name)
            fsio.write_json(folder / "lineage.json", known.public_lineage)
            check_folder(folder, read_config(folder))
            written = greatest(logits_of(Forms(folder, config, {}).base(), rows), expected)
            if not written <= MAX_LOGIT_DIFFERENCE:  # NaN too
                raise CheckFailed(
                    f"the folder that was written gives logits that are off by {written:.3g}",
                    "report this: what is written must be what was trained",
                )
    names = {stored: name for name, stored in DTYPES.items()}
    types = {t.dtype for tensors in plan.files.values() for t in tensors}
    return HfReport(
        folder=str(out),
        dtype=" and ".join(sorted(names[kind] for kind in types)),
        size_bytes=plan.num_bytes,
        rounding=greatest(expected, original),
        written=written,
        probe_tokens=sum(map(len, rows)),
    )


def check_place(out: Path, *sources: Path) -> None:
    """UserError unless `out` is free or an earlier export, and apart from what is exported."""
    place = out.resolve()
    for source in sources:
        inner = source.resolve()
        if place == inner or place in inner.parents or inner in place.parents:
            raise UserError(
                f"{out} and {source} lie in one another: the model must stay as it is",
                "choose another --out",
            )
    if out.exists() and not (out / RECORD).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no export of Mule's", "choose another --out")


def weight_shards(folder: Path) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of each file of weights, from the folder's own manifest."""
    manifest = fsio.read_json(folder / fsio.MANIFEST)
    return [
        {"file": name, "size_bytes": entry["bytes"], "sha256": entry["sha256"]}
        for name, entry in manifest["files"].items()
        if name.endswith(".safetensors")
    ]
