"""Every tensor of a file beside the model's own: are these its weights, as the type's blocks hold them?

One tensor at a time is in memory. What an honest file's error must be is not guessed: some rows of
each tensor go through the quantiser again, and the file must be as near to the model as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from mule import progress
from mule.errors import ModelError
from mule.export.gguf import PlannedTensor
from mule.export.origin import Original
from mule.export.quantize import Quantizer
from mule.export.stored import StoredTensors, can_be_numbers, through_blocks

Values = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

SAMPLE_ROWS = 48  # of each tensor, through the quantiser again
_SKETCH_ROWS = 4  # of each tensor, kept to be found again under another name
_BLOCK = 32  # numbers that share a scale in every type
_T = GGMLQuantizationType
# The error of an honest file, in parts of the weights' root mean square: at most so many times what
# our blocks make of the same rows. With an importance matrix the weights that matter less are worse.
_SLACK, _SLACK_IMPORTANCE = 1.2, 2.0
_SLACK_WHOLE = 2.0  # of all rows against the sample's
_SLACK_ROW = 5.0  # of one row
_EXACT = 2e-6
_SMALL_ROW = 0.1  # of the size of all: a row below is measured by this
# Where the quantiser is missing: measured on normally distributed weights.
_TYPICAL = {_T.Q2_K: 0.30, _T.Q3_K: 0.16, _T.IQ4_XS: 0.09, _T.IQ4_NL: 0.09}
_F16_MAX = 65504.0


@dataclass(frozen=True)
class TensorProof:
    """One tensor: its error in parts of the weights' root mean square, and the sample's.

    `honest` is the error of our own blocks on the sampled rows, `honest_row` that of their worst row,
    `identical` the share of the file's blocks there that are ours (None without the quantiser).
    """

    name: str
    type: GGMLQuantizationType
    error: float
    sample_error: float
    honest: float
    worst_row: float
    honest_row: float
    identical: float | None
    num_broken: int
    limit: float

    @property
    def ok(self) -> bool:
        within = self.sample_error <= self.limit and self.error <= _SLACK_WHOLE * self.limit
        row = _SLACK_ROW * max(self.honest_row, self.limit)
        return self.num_broken == 0 and within and self.worst_row <= row


@dataclass
class Lean:
    """How far the file's weights lean from the model's towards those of another model.

    `dot` = sum of (file - model)(other - model), `square` = sum of (other - model)^2, `noise` the
    variance of `dot` if the file's errors had nothing to do with the other model, `energy` = sum of
    (file - model)^2, and `rounding` as much of that as two roundings to the type's blocks make.
    """

    dot: float = 0.0
    square: float = 0.0
    noise: float = 0.0
    energy: float = 0.0
    rounding: float = 0.0

    def add(self, error: Values, towards: Values, rounding: float) -> None:
        wide, other = error.astype(np.float64).ravel(), towards.astype(np.float64).ravel()
        self.dot += float(wide @ other)
        self.square += float(other @ other)
        self.noise += float(np.square(wide) @ np.square(other))
        self.energy += float(wide @ wide)
        self.rounding += wide.size * (2 * rounding) ** 2

    @property
    def share(self) -> float:
        """0: the model's weights; 1: the other's; -1: as far on the opposite side."""
        return self.dot / self.square if self.square > 0 else 0.0

    @property
    def is_sure(self) -> bool:
        """Beyond chance, and the way to the other model is all that is wrong with the weights."""
        if not abs(self.dot) > 6 * math.sqrt(self.noise) > 0:
            return False
        return self.energy - self.dot**2 / self.square <= self.rounding + 0.1 * self.energy


@dataclass
class WeightsProof:
    """All tensors of a file; `sketches` are a few rows of each of the model's, by name."""

    tensors: list[TensorProof] = field(default_factory=list)
    leans: dict[str, Lean] = field(default_factory=dict)
    sketches: dict[str, Values] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[TensorProof]:
        return [tensor for tensor in self.tensors if not tensor.ok]

    def as_dict(self) -> dict[str, Any]:
        """The figures of the report: how many tensors, and the worst beside what it should be."""
        compared = [tensor for tensor in self.tensors if tensor.identical is not None]
        worst = max(self.tensors, key=lambda t: t.sample_error / t.limit, default=None)
        found = {
            "tensors": len(self.tensors),
            "failed": len(self.failed),
            "identical_blocks": _mean([t.identical or 0.0 for t in compared]),
        }
        if worst is not None:
            found |= {"worst": worst.name, "error": worst.sample_error, "honest": worst.honest}
        return found


def wrong_tensors(
    stored: StoredTensors, expected: Mapping[str, PlannedTensor], *, tied: bool
) -> Iterator[str]:
    """Names and shapes that are not the model's, in words."""
    missing = [name for name in expected if name not in stored.infos]
    if "output.weight" in missing:
        missing.remove("output.weight")
        yield (
            "output.weight is missing: the model has a head of its own, and llama.cpp would take "
            "the embedding in its place (tied wrongly)"
        )
    factors = [name for name in missing if name.startswith("rope_")]
    if factors:
        missing = [name for name in missing if name not in factors]
        yield f"{', '.join(factors)} missing: the scaling of RoPE is left out"
    shared = [name for name in missing if "_shexp." in name]
    if shared:
        missing = [name for name in missing if name not in shared]
        yield f"the shared expert is left out: {len(shared)} missing, first {shared[0]}"
    if missing:
        yield f"{len(missing)} missing, first {missing[0]} ({expected[missing[0]].source})"
    allowed = {"output.weight"} if tied else set()
    if extra := [name for name in stored.infos if name not in expected and name not in allowed]:
        yield f"{len(extra)} that the model does not have, first {extra[0]}"
    for name, tensor in expected.items():
        info = stored.infos.get(name)
        if info is not None and info.shape != tensor.shape:
            turned = " (transposed)" if info.shape == tensor.shape[::-1] else ""
            yield f"{name} has shape {info.shape}, the model's is {tensor.shape}{turned}"


def sampled(num_rows: int, count: int = SAMPLE_ROWS) -> Rows:
    """The rows that are looked at twice: evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, num_rows - 1, min(count, num_rows)).astype(np.int64))


class Prover:
    """Compares a file with `original`; `others` are models whose weights it may hold by mistake."""

    def __init__(
        self,
        stored: StoredTensors,
        original: Original,
        others: Mapping[str, Original],
        quantizer: Quantizer,
    ) -> None:
        self.stored, self.original, self.others = stored, original, others
        self.quantizer = quantizer
        keys = stored.header.metadata
        weighted = any(key.startswith("quantize.imatrix") for key in keys)
        self.slack = _SLACK_IMPORTANCE if weighted else _SLACK
        self.weighted = weighted

    def prove(self, names: list[str]) -> WeightsProof:
        """All tensors of `names`, those that the file and the model have in the same shape."""
        proof = WeightsProof(leans={label: Lean() for label in self.others})
        total = sum(math.prod(self.stored.infos[name].shape) for name in names)
        with progress.task("Comparing weights", total=total, unit="weights") as bar:
            for name in names:
                self._prove_one(name, proof)
                bar.advance(math.prod(self.stored.infos[name].shape))
        return proof

    def _prove_one(self, name: str, proof: WeightsProof) -> None:
        kind = self.stored.infos[name].type
        if not can_be_numbers(self.stored.infos[name]):
            proof.skipped.append(f"{name} of {kind.name}")
            return
        wanted = in_rows(self.original.values(name))
        proof.sketches[name] = wanted[sampled(len(wanted), _SKETCH_ROWS)].copy()
        rows = _telling_rows(wanted)
        ours = self.requantized(name, wanted[rows], kind)
        found = self.stored.rows(name, rows)
        proof.tensors.append(self._compared(name, wanted, (found, wanted[rows], ours)))
        if ours is not None and np.isfinite(found).all():
            self._lean(proof, found - ours, wanted[rows], rows)

    def _lean(self, proof: WeightsProof, error: Values, wanted: Values, rows: Rows) -> None:
        """`error` is what our blocks do not explain: rounding alone leans nowhere then."""
        tensor = proof.tensors[-1]
        rounding = (tensor.honest + self.original.rounding(tensor.name)) * rms(wanted)
        for label, other in self.others.items():
            theirs = self._theirs(other, tensor.name)
            if theirs is not None:
                proof.leans[label].add(error, theirs[rows] - wanted, rounding)

    def _compared(
        self, name: str, wanted: Values, sample: tuple[Values, Values, Values | None]
    ) -> TensorProof:
        """All rows part by part; `sample`: some of the file's, the model's, and ours in blocks."""
        found, telling, ours = sample
        kind = self.stored.infos[name].type
        whole = RowErrors()
        for start, part in self.stored.parts(name):
            whole.add(part, wanted[start : start + len(part)])
        slack, honest, honest_row = 2 * self.slack, _TYPICAL.get(kind, 0.5), 0.5
        if ours is not None:
            blocks = RowErrors().add(ours, telling)
            slack, honest, honest_row = self.slack, blocks.overall, blocks.worst
        limit = slack * honest + _EXACT + 2 * self.original.rounding(name)
        return TensorProof(
            name=name,
            type=kind,
            error=whole.overall,
            sample_error=error_of(found, telling),
            honest=honest,
            worst_row=whole.worst,
            honest_row=honest_row,
            identical=same_blocks(found, ours) if ours is not None else None,
            num_broken=whole.num_broken,
            limit=limit,
        )

    def requantized(self, name: str, rows: Values, kind: GGMLQuantizationType) -> Values | None:
        """`rows` through the blocks of `kind`; None where only llama.cpp makes them, and is absent."""
        if kind == _T.F16:
            rows = np.clip(rows, -_F16_MAX, _F16_MAX)
        try:
            return through_blocks(self.quantizer, name, rows, kind)
        except (ModelError, NotImplementedError):
            return None

    def _theirs(self, other: Original, name: str) -> Values | None:
        """The tensor of another model as rows; None where it has none of this shape."""
        tensor = other.planned.get(name)
        if tensor is None or any(part.source not in other.weights.files for part in tensor.parts):
            return None
        theirs = other.values(name)
        return in_rows(theirs) if theirs.shape == self.stored.infos[name].shape else None


# ---------------------------------------------------------------- figures


def in_rows(values: Values) -> Values:
    """A tensor as (rows, numbers a row); a vector is one row."""
    return values.reshape(-1, values.shape[-1])


def rms(values: Values) -> float:
    return math.sqrt(float(np.square(values, dtype=np.float64).mean())) if values.size else 0.0


def error_of(found: Values, wanted: Values) -> float:
    """Root mean square of the difference, in parts of that of `wanted`; NaN is infinite."""
    return RowErrors().add(found, wanted).overall


def same_blocks(found: Values, ours: Values) -> float:
    """The share of blocks whose numbers are the same."""
    width = _BLOCK if found.shape[1] % _BLOCK == 0 else found.shape[1]
    same = (found == ours).reshape(-1, width).all(1)
    return float(same.mean())


def _telling_rows(wanted: Values) -> Rows:
    """The sampled rows, none of them empty as those of unused tokens may be."""
    filled = np.flatnonzero(wanted.any(1))
    return filled[sampled(len(filled))] if len(filled) else sampled(len(wanted))


class RowErrors:
    """How far rows are from those wanted: mean squares of each, gathered part by part."""

    def __init__(self) -> None:
        self.num_broken = 0  # NaN and infinity
        self._errors: list[npt.NDArray[np.float64]] = []
        self._sizes: list[npt.NDArray[np.float64]] = []

    def add(self, found: Values, wanted: Values) -> RowErrors:
        with np.errstate(all="ignore"):
            self._errors.append(np.square(found - wanted).mean(1, dtype=np.float64))
        self._sizes.append(np.square(wanted).mean(1, dtype=np.float64))
        self.num_broken += int((~np.isfinite(found)).sum())
        return self

    @property
    def overall(self) -> float:
        """Root mean square of the difference, in parts of that of the weights; NaN is infinite."""
        size = max(float(np.concatenate(self._sizes).sum()), 1e-60)
        error = math.sqrt(float(np.concatenate(self._errors).sum()) / size)
        return error if math.isfinite(error) else math.inf

    @property
    def worst(self) -> float:
        """The same of the worst row, in parts of its own size or of a small row's."""
        errors, sizes = np.concatenate(self._errors), np.concatenate(self._sizes)
        floor = max(_SMALL_ROW**2 * float(sizes.mean()), 1e-60)
        worst = math.sqrt(float((errors / np.maximum(sizes, floor)).max()))
        return worst if math.isfinite(worst) else math.inf


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
