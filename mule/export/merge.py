"""Folding an adapter into its base: what is refused, what is written, what is proven.

The weights are streamed (merge_weights.py), and so are the models of the proof (merge_proof.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mule import fsio, locks, progress
from mule.adapters.delta import Delta, read_deltas
from mule.adapters.identity import Identity, base_identity, recorded_quantization
from mule.adapters.lora_files import CONFIG, UP, WEIGHTS
from mule.adapters.source import Source
from mule.errors import CheckFailed, ModelError, UserError
from mule.export.about import public_path
from mule.export.card import CardFacts, licence_files, write_card
from mule.export.merge_forms import Forms, from_trained, quantized_values
from mule.export.merge_probe import Rows, probe_rows
from mule.export.merge_proof import (
    Proof,
    check_folder,
    measure_reference,
    prove,
    require_memory,
)
from mule.export.merge_tokenizer import Whose, copy_tokenizer, tokenizer_folder
from mule.export.merge_weights import (
    DTYPES,
    MergePlan,
    plan_merge,
    write_merged,
)
from mule.models.config import ModelConfig
from mule.models.folder import read_config
from mule.models.streamed import TORCH_DTYPES
from mule.tokenizer import Tokenizer

Onto = Literal["quantized", "original"]
_OTHER_BYTES = 64 * 2**20  # tokenizer, card and the like
_LINEAGE = "lineage.json"


@dataclass(frozen=True)
class MergeReport:
    """What was written, and how far its logits are from the adapter's and from the base's."""

    folder: str
    base: str
    num_layers: int
    dtype: str
    size_bytes: int
    merged_against_adapter: float
    merged_against_base: float
    tokenizer: Whose
    adapter_sha256: str
    proof: dict[str, Any]
    onto: Onto | None = None
    quantized: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    """What is merged into what, checked."""

    name: str
    base_dir: Path
    adapter_dir: Path
    config: ModelConfig
    forms: Forms
    plan: MergePlan
    onto: Onto | None
    quantized: str | None
    tokenizer_dir: Path
    adapter_sha256: str

    @property
    def dtype(self) -> str:
        """The type of the output, as --dtype names it; several where the base has several."""
        names = {stored: name for name, stored in DTYPES.items()}
        found = {t.dtype for tensors in self.plan.files.values() for t in tensors}
        return " and ".join(sorted(names[dtype] for dtype in found))


def merge_adapter(
    source: Source,
    out: Path,
    lineage: dict[str, Any],
    *,
    sample: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    onto: Onto | None = None,
    tokenizer: Whose | None = None,
    overwrite: bool = False,
    shard_bytes: int | None = None,
) -> MergeReport:
    """Write base + adapter as one model folder, in the base's types or in `dtype`.

    `sample` is a run's held-out sample, for the proof. `onto` says, of an adapter of QLoRA, whether
    the base is what it was trained on (the default) or the original; `tokenizer`, whose is taken
    where base and adapter differ. The weights are cut into files as the base's are, or by
    `shard_bytes`.

    Raises UserError for what cannot be merged, and CheckFailed unless the merged logits are the
    adapter's, but for rounding, and not the base's; nothing is written then. The base is hashed
    before and after.
    """
    job = _prepare(source, dtype, onto, tokenizer, shard_bytes)
    _check_output(out, job, overwrite)
    waiting = f"another process writes {out}: waiting for it"
    with locks.locked(out.parent / f".{out.name}.lock", lambda: progress.note(waiting)):
        fsio.remove_leftovers(out.parent, out.name)
        fsio.require_space(out.parent, job.plan.num_bytes + _OTHER_BYTES, "the merged model")
        return _merge(job, out, lineage, sample)


def _merge(
    job: _Job, out: Path, lineage: dict[str, Any], sample: Mapping[str, Any] | None
) -> MergeReport:
    base_dir = job.base_dir
    rows = probe_rows(job.config, Tokenizer.load(job.tokenizer_dir), sample)
    with progress.task("Merging", total=5, unit="stages") as bar:
        before = base_identity(base_dir)
        check_folder(base_dir, job.config)
        bar.advance()
        reference = measure_reference(job.forms, rows, job.plan.dtypes())
        bar.advance()
        with fsio.atomic_folder(out) as folder:
            write_merged(job.plan, folder)
            _copy_files(job, folder)
            bar.advance()
            proof = prove(folder, reference, rows, job.dtype)
            report = _report(job, out, proof, rows)
            bar.advance()
            _write_about(job, folder, report, before, lineage)
            if base_identity(base_dir, fresh=True) != before:
                raise CheckFailed(
                    f"{base_dir} changed during the merge", "restore the base, merge again"
                )
            bar.advance()
    return report


# ---------------------------------------------------------------- what is refused


def _prepare(
    source: Source,
    dtype: str | None,
    onto: Onto | None,
    whose: Whose | None,
    shard_bytes: int | None,
) -> _Job:
    """Everything that can be checked before a model is loaded."""
    base_dir, adapter_dir = _folders(source)
    check_dtype(dtype)
    config = read_config(base_dir)
    require_memory(config)
    adapter_sha256 = fsio.sha256_file(adapter_dir / WEIGHTS)
    _refuse_second_merge(base_dir, adapter_dir, adapter_sha256)
    deltas = read_deltas(adapter_dir)
    require_effect(adapter_dir, deltas)
    quantized = recorded_quantization(adapter_dir)
    if onto is not None and quantized is None:
        raise UserError(
            f"--onto {onto} is for adapters of QLoRA; {source.name} was trained on the base as it is",
            "leave --onto away",
        )
    onto = onto or ("quantized" if quantized else None)
    values = quantized_values(config, quantized) if quantized and onto == "quantized" else None
    tied = config.tie_embeddings
    plan = plan_merge(
        base_dir, deltas, tied=tied, dtype=dtype, values=values, shard_bytes=shard_bytes
    )
    return _Job(
        name=source.name,
        base_dir=base_dir,
        adapter_dir=adapter_dir,
        config=config,
        forms=Forms(base_dir, config, deltas, values),
        plan=plan,
        onto=onto,
        quantized=quantized,
        tokenizer_dir=tokenizer_folder(base_dir, adapter_dir, whose),
        adapter_sha256=adapter_sha256,
    )


def check_dtype(dtype: str | None) -> None:
    """UserError for a --dtype that weights cannot be written in."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is no type of weights", f"one of {', '.join(DTYPES)}")


def _folders(source: Source) -> tuple[Path, Path]:
    """The base and the adapter."""
    if source.adapter_dir is not None and source.model_dir is not None:
        return source.model_dir, source.adapter_dir
    folder = source.model_dir or source.gguf_file
    merge = _merge_of(folder) if folder is not None else None
    if merge is not None:
        raise ModelError(
            f"{source.name} is merged already: it is {merge['base']} with its adapter in it",
            f"export it: mule export {folder}",
        )
    raise ModelError(f"{source.name} is not an adapter: there is nothing to merge", "export it")


def _merge_of(folder: Path) -> dict[str, Any] | None:
    """What `mule merge` recorded in a model folder; None when it did not write it."""
    file = folder / _LINEAGE
    found = fsio.read_json(file) if file.is_file() else None
    merge = found.get("merge") if isinstance(found, dict) else None
    return merge if isinstance(merge, dict) and "base" in merge else None


def _refuse_second_merge(base_dir: Path, adapter_dir: Path, adapter_sha256: str) -> None:
    merge = _merge_of(base_dir)
    if merge is not None and merge.get("adapter_sha256") == adapter_sha256:
        raise ModelError(
            f"{base_dir} has the adapter {adapter_dir} in it already: merging it twice would "
            "double its effect",
            f"use {base_dir} as it is, or merge into {merge['base']}",
        )


def require_effect(adapter_dir: Path, deltas: Mapping[str, Delta]) -> None:
    """Read every tensor of the adapter: all finite, and not all without effect."""
    changes = False
    for delta in deltas.values():
        changes |= bool(delta.tensors()[UP].any()) or delta.use_dora
    if not changes:
        raise CheckFailed(
            f"{adapter_dir}: the adapter has no effect: every lora_B is zero, as before training",
            "train it, or check that this is the adapter you meant",
        )


def _check_output(out: Path, job: _Job, overwrite: bool) -> None:
    """UserError unless `out` is free, or a merged model to be replaced, and apart from its sources."""
    place = out.resolve()
    for what, folder in (("base", job.base_dir), ("adapter", job.adapter_dir)):
        inner = folder.resolve()
        if place == inner or inner in place.parents or place in inner.parents:
            raise UserError(
                f"{out} and the {what} {folder} lie in one another: the {what} must stay as it is",
                "choose another --out",
            )
    if not out.exists():
        return
    if not out.is_dir() or _merge_of(out) is None:
        raise UserError(f"{out} exists and is not a merged model of Mule's", "choose another --out")
    if not overwrite:
        raise UserError(
            f"{out} exists: a model that was merged before",
            "choose another --out, or replace it: --overwrite",
        )


# ---------------------------------------------------------------- what is written


def _copy_files(job: _Job, folder: Path) -> None:
    """Put what belongs to the base beside the weights, byte for byte."""
    copy_config(job.base_dir, folder, job.plan.dtype)
    copy_tokenizer(job.base_dir, job.tokenizer_dir, folder)
    for file in licence_files(job.base_dir):
        shutil.copyfile(file, folder / file.name)


def copy_config(source: Path, folder: Path, dtype: str | None) -> None:
    """Copy config.json into an open folder, byte for byte where the weights keep their types."""
    config = folder / "config.json"
    shutil.copyfile(source / "config.json", config)
    if dtype is None:
        return
    raw = fsio.read_json(config)
    keys = {"dtype", "torch_dtype"} & raw.keys() or {"torch_dtype"}
    raw |= dict.fromkeys(keys, str(TORCH_DTYPES[dtype]).removeprefix("torch."))
    config.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _report(job: _Job, out: Path, proof: Proof, rows: Rows) -> MergeReport:
    quantized = None
    if job.quantized is not None:
        found = from_trained(job.forms, job.quantized, rows)
        quantized = {name: asdict(distance) for name, distance in found.items()}
    return MergeReport(
        folder=str(out),
        base=str(job.base_dir),
        num_layers=len(job.plan.deltas),
        dtype=job.dtype,
        size_bytes=job.plan.num_bytes,
        merged_against_adapter=proof.against_adapter.max_logit_difference,
        merged_against_base=proof.against_base.max_logit_difference,
        tokenizer="base" if job.tokenizer_dir == job.base_dir else "adapter",
        adapter_sha256=job.adapter_sha256,
        proof=proof.as_dict(),
        onto=job.onto,
        quantized=quantized,
    )


def _write_about(
    job: _Job, folder: Path, report: MergeReport, identity: Identity, lineage: dict[str, Any]
) -> None:
    """The model card, and where the model comes from."""
    facts = CardFacts(
        name=job.name,
        base_dir=job.base_dir,
        base_identity=identity,
        adapter=job.name,
        adapter_sha256=job.adapter_sha256,
        adapter_config=fsio.read_json(job.adapter_dir / CONFIG),
        lineage=lineage,
        dtype=job.dtype,
        report=report.as_dict(),
    )
    write_card(folder, facts)
    names = {"folder": report.folder, "base": report.base}  # no user's name: it may be passed on
    names = {key: public_path(path) for key, path in names.items()}
    merge = report.as_dict() | names | {"base_identity": identity}
    fsio.write_json(folder / _LINEAGE, lineage | {"merge": merge})
