"""The proof of a merge: logits of the adapter on its base, and of the merged folder, on probe rows.

One block of one model is in memory at a time, in fp32; of each model, the logits are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mule import machine, progress
from mule.errors import CheckFailed, UserError
from mule.export.merge_forms import Forms
from mule.export.merge_probe import (
    NUM_RANDOM_ROWS,
    NUM_TEXT_ROWS,
    PROBE_TOKENS,
    Distance,
    Logits,
    Rows,
    distance,
    greatest,
    logits_of,
)
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.models.folder import load_weights, read_config

# fp32 arithmetic in another order; measured 2e-6 to 3e-5 on models of 2M to 10M (docs/log.md).
MAX_LOGIT_DIFFERENCE = 1e-3
_ROUNDING_SLACK = 1.1  # a weight at the border of two values may go to either
_MAX_LOST_SHARE, _TOLD_LOST_SHARE = 0.5, 0.05  # of the adapter's effect, in nats
_BYTES = 4  # of fp32
_NUM_KEPT = 5  # logits of so many models at once, one of them of padded rows


@dataclass(frozen=True)
class Reference:
    """What the merged folder must give, kept while the models are gone.

    `arithmetic` is how far merging in fp32 takes the logits from the adapter's, `rounding` how far
    the type of the output takes them from there.
    """

    base: Logits
    adapter: Logits
    expected: Logits
    arithmetic: float
    rounding: float

    @property
    def tolerance(self) -> float:
        """The greatest difference that the merged folder may have from the adapter."""
        return MAX_LOGIT_DIFFERENCE + _ROUNDING_SLACK * self.rounding


@dataclass(frozen=True)
class Proof:
    """The merged folder against the adapter on its base, and against the base alone.

    `written` is how far its logits are from those of the same merge in memory.
    """

    tolerance: float
    arithmetic: float
    rounding: float
    written: float
    against_adapter: Distance
    against_base: Distance
    base_against_adapter: Distance
    probe_tokens: int

    @property
    def lost_share(self) -> float:
        """KL(adapter || merged) in units of KL(adapter || base): 0 keeps all of what was learned."""
        return self.against_adapter.kl_mean / max(self.base_against_adapter.kl_mean, 1e-12)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"lost_share": self.lost_share}


def require_memory(config: ModelConfig) -> None:
    """UserError unless what the proof holds at once fits into what is free."""
    embedding = config.vocab_size * config.hidden_size
    block = max(cost.layer_params(config, layer) for layer in range(config.num_layers))
    part = max(1.5 * embedding, 3 * block)  # as stored, in fp32, and merged
    logits = (NUM_RANDOM_ROWS + NUM_TEXT_ROWS) * PROBE_TOKENS * config.vocab_size
    needed = int(_BYTES * (part + _NUM_KEPT * logits))
    if (free := machine.available_bytes()) < needed:
        raise UserError(
            f"checking the merge needs {needed / 2**20:,.0f} MiB of memory; "
            f"{free / 2**20:,.0f} MiB are free",
            "close other programs, or merge on a machine with more memory",
        )


def measure_reference(forms: Forms, rows: Rows, dtypes: Mapping[str, torch.dtype]) -> Reference:
    """The logits of the base and of the adapter on it, then of the same merged and rounded.

    `dtypes` is the type of each weight of the output. Raises CheckFailed when the adapter has no
    effect, or when merging changes the model.
    """
    base = logits_of(forms.base(), rows)
    adapter = logits_of(forms.adapter(), rows)
    _require_finite(adapter, "the adapter on its base")
    _require_effect(greatest(adapter, base))
    merged = expected = logits_of(forms.merged(), rows)
    arithmetic, rounding = greatest(merged, adapter), 0.0
    if not arithmetic <= MAX_LOGIT_DIFFERENCE:  # NaN too
        raise CheckFailed(
            f"the merged logits differ from the adapter's by {arithmetic:.3g}, "
            f"more than {MAX_LOGIT_DIFFERENCE}",
            "report this: a merge in fp32 must not change the model",
        )
    if set(dtypes.values()) != {torch.float32}:
        expected = logits_of(forms.merged(dtypes), rows)
        rounding = greatest(expected, merged)
    return Reference(base, adapter, expected, arithmetic, rounding)


def prove(folder: Path, reference: Reference, rows: Rows, dtype: str) -> Proof:
    """Open the merged folder, check names, shapes and finiteness, and compare its logits.

    Raises CheckFailed when it gives other logits than the adapter's, but for rounding, or the
    base's, or when rounding to `dtype` undid what was learned.
    """
    config = read_config(folder)
    check_folder(folder, config)
    found = logits_of(Forms(folder, config, {}).base(), rows)
    _require_finite(found, "the merged model")
    proof = Proof(
        tolerance=reference.tolerance,
        arithmetic=reference.arithmetic,
        rounding=reference.rounding,
        written=greatest(found, reference.expected),
        against_adapter=distance(rows, reference.adapter, found),
        against_base=distance(rows, reference.base, found),
        base_against_adapter=distance(rows, reference.adapter, reference.base),
        probe_tokens=sum(map(len, rows)),
    )
    allowed = MAX_LOGIT_DIFFERENCE + (_ROUNDING_SLACK - 1) * reference.rounding
    if proof.written > allowed or proof.against_adapter.max_logit_difference > proof.tolerance:
        raise CheckFailed(
            f"the folder that was written gives logits that are off by {proof.written:.3g} from the "
            f"merge in memory, more than {allowed:.3g}",
            "report this: what is written must be what was merged",
        )
    _require_kept(proof, dtype)
    _require_effect(proof.against_base.max_logit_difference)
    return proof


def _require_kept(proof: Proof, dtype: str) -> None:
    """CheckFailed when rounding took most of what was learned, a warning when it took some."""
    if proof.lost_share > _MAX_LOST_SHARE:
        raise CheckFailed(
            f"rounding to {dtype} undoes what the adapter learned: the merged model is "
            f"{proof.against_adapter.kl_mean:.2g} nats from the adapter's, the base "
            f"{proof.base_against_adapter.kl_mean:.2g}",
            "keep it: --dtype fp32, or train the adapter longer",
        )
    if proof.lost_share > _TOLD_LOST_SHARE:
        progress.note(
            f"rounding to {dtype} costs {proof.lost_share:.0%} of the adapter's effect (in nats); "
            "--dtype fp32 keeps it whole",
            "warning",
        )


def check_folder(folder: Path, config: ModelConfig) -> None:
    """ModelError unless the folder holds the weights of its config, all finite."""
    with torch.device("meta"):
        model = Decoder(config)
    load_weights(model, folder, fill=lambda _name, _parameter, _tensor: None)


def _require_finite(logits: Logits, what: str) -> None:
    if not all(torch.isfinite(row).all() for row in logits):
        raise CheckFailed(f"{what} gives NaN", "train the adapter again, at a lower rate")


def _require_effect(difference: float) -> None:
    if difference <= MAX_LOGIT_DIFFERENCE:
        raise CheckFailed(
            "the merged model equals its base: the adapter has no effect "
            f"(greatest logit difference {difference:.3g})",
            "train it longer, or check that this is the adapter you meant",
        )
