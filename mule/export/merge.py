"""Folding an adapter into its base, proven."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mule import fsio, progress
from mule.adapters.identity import base_identity
from mule.adapters.lora import merge_lora
from mule.adapters.source import Source, load_source
from mule.errors import CheckFailed, ModelError
from mule.models.decoder import Decoder
from mule.models.folder import load_model, model_state, save_model
from mule.tokenizer import Tokenizer
from mule.train.checkpoint import token_ids

# fp32 arithmetic in another order; measured 2e-6 to 3e-5 on models of 2M to 10M (docs/log.md).
MAX_LOGIT_DIFFERENCE = 1e-3
_PROBE_TOKENS = 64
_NUM_PROBES = 4


@dataclass(frozen=True)
class MergeReport:
    """What the merge changed: greatest logit differences on the probe rows."""

    folder: str
    base: str
    num_layers: int
    merged_against_adapter: float
    merged_against_base: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def merge_adapter(source: Source, out: Path, lineage: dict[str, Any]) -> MergeReport:
    """Write base + adapter as one fp32 model folder.

    Raises CheckFailed, and writes nothing, unless the merged logits equal the adapter's and differ
    from the base's; the base is hashed before and after.
    """
    if source.adapter_dir is None or source.model_dir is None:
        raise ModelError(f"{source.name} is not an adapter: there is nothing to merge", "export it")
    with progress.task("Merging", total=5, unit="stages") as bar:
        before = base_identity(source.model_dir)
        base_logits = _probe(load_model(source.model_dir))
        bar.advance()
        model, tokenizer = load_source(source)
        adapter_logits = _probe(model)
        bar.advance()
        num_layers = merge_lora(model)
        merged_logits = _probe(model)
        bar.advance()
        report = MergeReport(
            str(out),
            str(source.model_dir),
            num_layers,
            float((merged_logits - adapter_logits).abs().max()),
            float((merged_logits - base_logits).abs().max()),
        )
        _check(report, merged_logits)
        _save(model, tokenizer, out, lineage | {"merge": report.as_dict()})
        bar.advance()
        if base_identity(source.model_dir) != before:
            raise CheckFailed(
                f"{source.model_dir} changed during the merge", "restore the base, merge again"
            )
        bar.advance()
    return report


def _probe(model: Decoder) -> torch.Tensor:
    """fp32 logits (B, T, V) of fixed random rows."""
    generator = torch.Generator().manual_seed(0)
    length = min(_PROBE_TOKENS, model.config.max_position_embeddings)
    shape = (_NUM_PROBES, length)
    return model.eval()(torch.randint(0, model.config.vocab_size, shape, generator=generator))


def _check(report: MergeReport, merged_logits: torch.Tensor) -> None:
    if not torch.isfinite(merged_logits).all():
        raise CheckFailed("the merged model gives NaN", "train the adapter again, at a lower rate")
    if report.merged_against_adapter > MAX_LOGIT_DIFFERENCE:
        raise CheckFailed(
            f"the merged logits differ from the adapter's by {report.merged_against_adapter:.3g}, "
            f"more than {MAX_LOGIT_DIFFERENCE}",
            "report this: a merge in fp32 must not change the model",
        )
    if report.merged_against_base <= MAX_LOGIT_DIFFERENCE:
        raise CheckFailed(
            "the merged model equals its base: the adapter has no effect "
            f"(greatest logit difference {report.merged_against_base:.3g})",
            "train it longer, or check that this is the adapter you meant",
        )


def _save(model: Decoder, tokenizer: Tokenizer, out: Path, lineage: dict[str, Any]) -> None:
    with fsio.atomic_folder(out) as folder:
        save_model(model_state(model), model.config, folder, extra=token_ids(tokenizer))
        tokenizer.save(folder)
        fsio.write_json(folder / "lineage.json", lineage)
