"""The proof of a GGUF adapter: on a base file in llama.cpp, the logits of the adapter in torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mule import progress
from mule.adapters.delta import read_deltas
from mule.adapters.identity import recorded_quantization
from mule.errors import ModelError, UserError
from mule.export.limits import Limits, limits_of
from mule.export.merge_forms import Forms, from_trained
from mule.export.merge_probe import (
    Distance,
    Logits,
    Rows,
    distance,
    greatest,
    logits_of,
    probe_rows,
)
from mule.export.verify import file_type
from mule.generate.gguf_header import read_header
from mule.generate.llamacpp import LlamaCpp
from mule.models.folder import read_config
from mule.tokenizer import Tokenizer

WEIGHTS_KEY = "mule.weights"  # SHA-256 of the weights that a file was written from
_MIN_EFFECT = 1e-3  # of an adapter on some logit; rounding alone makes 1e-5
_NO_SCALE = 1e-6  # at most so far apart are scale 0 and no adapter at all
_BASE_ERRORS = 4  # the file with its adapter may be so many times as far off as without
_RELATIVE = 1e-4  # of the largest logit, where that is more than the limit


@dataclass(frozen=True)
class AdapterProof:
    """A file with the adapter on it, and without, each against torch.

    `effect` is what the adapter changes in torch; `scale_zero` how far scale 0 is from no adapter;
    `from_trained`, of QLoRA, how far the adapter on this base is from it on the base in 4 bits.
    """

    file: str
    base_file: str
    base_type: str
    with_adapter: Distance
    without: Distance
    effect: Distance
    scale_zero: float
    probe_tokens: int
    from_trained: dict[str, float] | None = None
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def verdict(self) -> str:
        if not self.ok:
            return f"not the same adapter: {self.failures[0]}"
        found = self.with_adapter
        return (
            f"the same adapter: on {self.base_file} logits within {found.max_logit_difference:.2g} "
            f"of the trained model's, where the base alone is {self.effect.max_logit_difference:.2g} "
            "away"
        )

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "verdict": self.verdict, **asdict(self)}


def prove_adapter(
    gguf_file: Path,
    base_file: Path,
    adapter_dir: Path,
    base_dir: Path,
    *,
    sample: Mapping[str, Any] | None = None,
    threads: int | None = None,
) -> AdapterProof:
    """Run `base_file` in llama.cpp with the adapter, without it, and with scale 0.

    `sample` is a run's held-out sample. Raises UserError for a file of other weights than the base's.
    """
    header = read_header(base_file)
    config = read_config(base_dir)
    forms = Forms(base_dir, config, read_deltas(adapter_dir))
    tokenizer_dir = adapter_dir if (adapter_dir / "tokenizer.json").is_file() else base_dir
    rows = probe_rows(config, Tokenizer.load(tokenizer_dir), sample)
    with progress.task("Checking the adapter in llama.cpp", total=3, unit="models") as bar:
        base = logits_of(forms.base(), rows)
        bar.advance()
        adapter = logits_of(forms.adapter(), rows)
        bar.advance()
        without, found, off = _in_llama_cpp(gguf_file, base_file, rows, config.vocab_size, threads)
        bar.advance()
    quantized, trained = recorded_quantization(adapter_dir), None
    if quantized is not None:
        trained = from_trained(forms, quantized, rows)["original"].as_dict()
    proof = AdapterProof(
        file=gguf_file.name,
        base_file=base_file.name,
        base_type=file_type(header),
        with_adapter=distance(rows, adapter, found),
        without=distance(rows, base, without),
        effect=distance(rows, adapter, base),
        scale_zero=greatest(off, without),
        probe_tokens=sum(map(len, rows)),
        from_trained=trained,
    )
    rounded = any(t.type.name != "F32" for t in read_header(gguf_file).tensors)
    kind = "f16" if rounded and proof.base_type == "f32" else proof.base_type
    limits = limits_of(kind, str(header.metadata.get("general.architecture")))
    _judge(proof, limits, max(float(row.abs().max()) for row in adapter))
    return proof


def check_base_file(base_file: Path, weights_sha256: str | None) -> list[str]:
    """UserError when a file was written from other weights; what is not known about it otherwise."""
    metadata = read_header(base_file).metadata
    if metadata.get("general.type") == "adapter":
        raise UserError(f"{base_file} is an adapter itself", "give a GGUF file of the base")
    found = metadata.get(WEIGHTS_KEY)
    if found is None or weights_sha256 is None:
        return [f"{base_file.name} does not say which weights it was written from"]
    if found != weights_sha256:
        raise UserError(
            f"{base_file} was written from other weights than those of the adapter's base",
            "write a file of the base: mule export BASE --types f16",
        )
    return []


def _in_llama_cpp(
    gguf_file: Path, base_file: Path, rows: Rows, vocab_size: int, threads: int | None
) -> tuple[Logits, Logits, Logits]:
    """Logits of the base file alone, with the adapter, and with the adapter at scale 0."""
    room = max(len(row) for row in rows)
    with LlamaCpp(base_file, n_ctx=room, threads=threads, exact=True) as model:
        if model.num_tokens != vocab_size:
            raise ModelError(
                f"{base_file}: {model.num_tokens} tokens, and the adapter's base has {vocab_size}",
                "give a GGUF file of the base",
            )

        def logits() -> Logits:
            return [torch.from_numpy(np.array(model.logits(row.tolist()))) for row in rows]

        without = logits()
        model.use_adapter(gguf_file, 1.0)
        found = logits()
        model.use_adapter(gguf_file, 0.0)
        return without, found, logits()


def _judge(proof: AdapterProof, limits: Limits | None, largest: float) -> None:
    """Fill in `failures` and `notes`; written so that NaN is a failure.

    `limits`: of the more rounded of the two files; None for a file of an unknown type.
    """
    fails, near, alone = proof.failures, proof.with_adapter, proof.without
    if not proof.scale_zero <= _NO_SCALE:
        fails.append(f"with scale 0 logits differ from the base's by {proof.scale_zero:.3g}")
    if not proof.effect.max_logit_difference > _MIN_EFFECT:
        fails.append(
            "the adapter has no effect: it changes a logit by at most "
            f"{proof.effect.max_logit_difference:.3g}"
        )
    if limits is not None and limits.logit is not None:
        most = max(limits.logit, _RELATIVE * largest)
        if not near.max_logit_difference <= most:
            fails.append(
                f"logits with the adapter differ by {near.max_logit_difference:.3g}, at most "
                f"{most:.3g}; without it by {alone.max_logit_difference:.3g}: its rows are in another "
                "order, or its scale is another"
            )
        return
    most = max(limits.kl_mean if limits else 0.0, _BASE_ERRORS * alone.kl_mean)
    if not near.kl_mean <= most:
        fails.append(
            f"with the adapter {near.kl_mean:.3g} nats from the model, at most {most:.3g}; without "
            f"it {alone.kl_mean:.3g}: its rows are in another order, or its scale is another"
        )
    elif not proof.effect.kl_mean > most:
        proof.notes.append(
            f"the adapter changes no more ({proof.effect.kl_mean:.2g} nats) than rounding the base "
            f"to {proof.base_type} may: this proves little; check on a file of f32 or f16"
        )
