"""Which known fault explains weights that are not the model's.

Each fault says what a tensor would hold if it had happened; the one that the file fits is named.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from mule.export.families import interleave_heads
from mule.export.layout import part_heads
from mule.export.mixer_faults import mixer_faults
from mule.export.origin import Origin
from mule.export.weights_proof import (
    Prover,
    TensorProof,
    Values,
    WeightsProof,
    error_of,
    in_rows,
    same_blocks,
    sampled,
)

BASE = "base"  # the label of the model that this one was trained from, among the others
_T = GGMLQuantizationType
_F16_MAX = 65504.0
_FITS = 3.0  # times the honest error: a fault that leaves no more explains the tensor
_PART = 0.3  # of the tensor's error: what is left must also be so much less
_LEANS = 0.25  # of the way to another model: what is less is not told
_SAME_BLOCKS = 0.9  # of a tensor that went through the blocks of another type before
_MAX_SHIFT = 3
_NUM_GRID_TENSORS = 4  # of an otherwise good file, looked at for the grid of another type
# Types a file may have been quantised from, the finest first; nothing is lost by the first two.
_HARMLESS = (_T.BF16, _T.F16)
_GRIDS = (_T.Q8_0, _T.Q6_K, _T.Q5_K, _T.Q4_K, _T.Q5_0, _T.Q4_0, _T.IQ4_XS, _T.Q3_K, _T.Q2_K)
_PARTS = {
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "attention output",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
    "ffn_gate_exps": "the experts' gate",
    "ffn_up_exps": "the experts' up",
    "ffn_gate_shexp": "the shared expert's gate",
    "ffn_up_shexp": "the shared expert's up",
    "token_embd": "the embedding",
    "output": "the head",
}


@dataclass(frozen=True)
class _Suspect:
    """A tensor that is not the model's: what the file holds, and what it should."""

    proof: TensorProof
    found: Values
    wanted: Values

    def fits(self, candidate: Values, found: Values | None = None) -> bool:
        """Whether the file holds `candidate`, but for what its blocks lose."""
        left = error_of(self.found if found is None else found, candidate)
        return left <= max(_FITS * self.proof.honest, 1e-5) and left < _PART * self.proof.error


def diagnose(prover: Prover, proof: WeightsProof, origin: Origin) -> list[str]:
    """What is wrong with the weights, the fault that explains most of them first; empty for none."""
    told = list(_leaning(proof, origin))
    told = told or list(_requantised(prover, proof))
    groups: defaultdict[str, list[str]] = defaultdict(list)
    holds: dict[str, str] = {}
    for tensor in [] if told else proof.failed:
        suspect = _suspect(prover, tensor)
        if (other := _another(suspect, proof)) is not None:
            holds[tensor.name] = other
        else:
            groups[_fault(prover, suspect)].append(tensor.name)
    told += _exchanged(holds)
    unknown = groups.pop("", [])
    for words, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        told.append(f"{words} ({_listed(names)})")
    if unknown:
        told.append(_unexplained(unknown, proof))
    return told


def _suspect(prover: Prover, tensor: TensorProof) -> _Suspect:
    found = in_rows(prover.stored.values(tensor.name))
    return _Suspect(tensor, found, in_rows(prover.original.values(tensor.name)))


# ---------------------------------------------------------------- other weights of the same model


def _leaning(proof: WeightsProof, origin: Origin) -> Iterator[str]:
    """The base's weights, an adapter at another strength, another checkpoint."""
    sure = {label: lean for label, lean in proof.leans.items() if lean.is_sure}
    told = {label: lean for label, lean in sure.items() if abs(lean.share) > _LEANS}
    if not told:
        return
    label = max(told, key=lambda label: 2 * told[label].dot - told[label].square)  # the nearest
    share, base = told[label].share, _called(origin.base_dir)
    if abs(share - 1) < _LEANS:
        if label != BASE:
            yield f"stale: the weights are those of {label}, not of {_called(origin.model_dir)}"
        elif origin.adapted:
            yield f"the adapter was left out: the weights are the base's ({base})"
        else:
            yield f"the training is not in it: the weights are those it began with ({base})"
    elif label == BASE and origin.adapted:
        twice = abs(share + 1) < _LEANS
        how = "is in it twice" if twice else f"is in it at {1 - share:.2g} times its strength"
        yield f"the adapter {how}"
    else:
        towards = base if label == BASE else label
        yield f"another state of this model: {share:.0%} of the way to the weights of {towards}"


def _called(folder: Path | None) -> str:
    """The end of a folder's path: what is told of a file is passed on with it."""
    return "/".join(folder.parts[-2:]) if folder is not None else ""


def _requantised(prover: Prover, proof: WeightsProof) -> Iterator[str]:
    """The grid of another type below the file's own: made from a file that was quantised before."""
    if prover.weighted or any(tensor.num_broken for tensor in proof.tensors):
        return
    fed = [t for t in proof.tensors if t.identical is not None and t.identical < _SAME_BLOCKS]
    seen: Counter[str] = Counter()
    fed = [t for t in fed if len(proof.sketches[t.name]) > 1][:_NUM_GRID_TENSORS]
    for tensor in fed:
        if (grid := _grid(prover, _suspect(prover, tensor))) is not None:
            seen[grid.name] += 1
    for name, count in seen.most_common(1):
        if name not in {kind.name for kind in _HARMLESS}:
            yield (
                f"made from an already quantised file: the grid of {name} is in {count} of "
                f"{len(fed)} tensors looked at, as in {fed[0].name}"
            )


def _grid(prover: Prover, suspect: _Suspect) -> GGMLQuantizationType | None:
    """The type whose blocks the weights went through before they came into the file's."""
    name, kind = suspect.proof.name, suspect.proof.type
    rows = sampled(len(suspect.wanted))
    found, wanted = suspect.found[rows], suspect.wanted[rows]
    for grid in (*_HARMLESS, *_GRIDS):
        if grid == kind:
            continue
        before = prover.requantized(name, wanted, grid) if _holds(wanted, grid) else None
        both = prover.requantized(name, before, kind) if before is not None else None
        if both is not None and same_blocks(found, both) > _SAME_BLOCKS:
            return grid
    return None


def _holds(rows: Values, grid: GGMLQuantizationType) -> bool:
    width = 256 if grid.name.endswith("_K") or grid == _T.IQ4_XS else 32
    return grid in _HARMLESS or rows.shape[1] % width == 0


# ---------------------------------------------------------------- faults of one tensor


def _fault(prover: Prover, suspect: _Suspect) -> str:
    """The fault that explains one tensor; "" for none."""
    for words in _faults(prover, suspect):
        return words
    return ""


def _faults(prover: Prover, suspect: _Suspect) -> Iterator[str]:
    name = suspect.proof.name
    if suspect.proof.num_broken:
        yield _broken(suspect)
        return
    shape = prover.original.shape
    yield from mixer_faults(name, suspect.found, suspect.wanted, shape, suspect.fits)
    yield from _wrong_rows(prover, suspect)
    if name.endswith("norm.weight"):
        for sign, words in ((-1, "norm + 1 forgotten"), (1, "norm + 1 twice")):
            if suspect.fits(suspect.wanted + np.float32(sign)):
                yield f"{words}: the weights are {'less' if sign < 0 else 'more'} by one"
    yield from _scaled(suspect)
    side = suspect.found.shape
    if side[0] == side[1] and suspect.fits(np.ascontiguousarray(suspect.wanted.T)):
        yield "transposed"
    if name == "output.weight" and "lm_head.weight" not in prover.original.named.values():
        yield "the head is a matrix of its own, the model's is its embedding (untied wrongly)"


def _broken(suspect: _Suspect) -> str:
    bad = ~np.isfinite(suspect.found)
    what = "NaN" if np.isnan(suspect.found[bad]).any() else "inf"
    most = float(np.abs(suspect.wanted[bad]).max())
    if suspect.proof.type == _T.F16 and most > _F16_MAX:
        return (
            f"f16 overflow: inf where the model holds {most:.4g}, and float16 ends at "
            f"{_F16_MAX:.0f}; export bf16"
        )
    return f"{what} in {int(bad.sum()):,} places where the model holds numbers up to {most:.3g}: damaged"


def _wrong_rows(prover: Prover, suspect: _Suspect) -> Iterator[str]:
    """Rows of q and k in another order, and rows that moved."""
    name, wanted = suspect.proof.name, suspect.wanted
    family, shape = prover.original.family, prover.original.shape
    part = name.split(".")[2] if name.startswith("blk.") else name
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(part)
    if heads:
        flat = wanted.reshape(-1) if name.endswith(".bias") else wanted
        swap = part_heads(flat, heads) if family.permuted else interleave_heads(flat, heads)
        must = "are not permuted" if family.permuted else "are permuted, and this family's are not"
        if suspect.fits(swap.reshape(wanted.shape)):
            yield f"q and k rows {must}"
        if family.permuted and suspect.fits(interleave_heads(flat, heads).reshape(wanted.shape)):
            yield "q and k rows are permuted twice"
        yield from _other_heads(suspect, flat, heads, shape)
    if prover.original.named[name].endswith("gate_up_proj.weight"):
        if suspect.fits(np.roll(wanted, len(wanted) // 2, axis=0)):
            yield "gate and up are swapped"
    if len(wanted) > 2 * _MAX_SHIFT:
        yield from _shifted(suspect)


def _other_heads(suspect: _Suspect, flat: Values, heads: int, shape: object) -> Iterator[str]:
    """Rows that were interleaved as if there were another number of heads."""
    plain = part_heads(flat, heads)
    for count in {getattr(shape, "heads", heads), getattr(shape, "kv_heads", heads)} - {heads}:
        if len(plain) % (2 * count) == 0:
            turned = interleave_heads(plain, count).reshape(suspect.wanted.shape)
            if suspect.fits(turned):
                yield f"rows permuted for {count} heads, and the model has {heads} there"


def _shifted(suspect: _Suspect) -> Iterator[str]:
    name = suspect.proof.name
    what = "vocabulary rows" if name in ("token_embd.weight", "output.weight") else "rows"
    what = "the router's rows" if "ffn_gate_inp." in name else what
    for shift in range(1, _MAX_SHIFT + 1):
        for sign, words in ((1, "down"), (-1, "up")):
            moved = np.roll(suspect.wanted, sign * shift, axis=0)
            inner = slice(shift, -shift)  # at the ends rows may be lost or doubled
            if suspect.fits(moved[inner], suspect.found[inner]):
                yield f"{what} shifted {words} by {shift}"


def _scaled(suspect: _Suspect) -> Iterator[str]:
    """All weights multiplied by one number."""
    found, wanted = suspect.found.ravel().astype(np.float64), suspect.wanted.ravel()
    size = float(np.square(wanted, dtype=np.float64).sum())
    if not found.any():
        yield "nothing but zeros"
    elif size:
        factor = float(found @ wanted) / size
        if abs(factor) > 1e-6 and suspect.fits((factor * suspect.wanted).astype(np.float32)):
            yield f"multiplied by {factor:.3g}"


# ---------------------------------------------------------------- tensors that hold another's


def _another(suspect: _Suspect, proof: WeightsProof) -> str | None:
    """The name of the model's tensor that the file holds here."""
    if suspect.proof.num_broken or not suspect.found.any():
        return None
    name = suspect.proof.name
    known = proof.sketches[name]
    sketch = suspect.found[sampled(len(suspect.found), len(known))]
    best, least = None, _PART * error_of(sketch, known)
    for other, rows in proof.sketches.items():
        if other != name and rows.shape == known.shape:
            left = error_of(sketch, rows)
            if left < least and left <= max(_FITS * suspect.proof.honest, 1e-5):
                best, least = other, left
    return best


def _exchanged(holds: dict[str, str]) -> Iterator[str]:
    """In words: parts of a layer swapped, layers swapped, a head that is the embedding."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name, other in holds.items():
        groups[_pair(name, other, mutual=holds.get(other) == name)].append(name)
    for words, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield f"{words} ({_listed(names)})"


def _pair(name: str, other: str, *, mutual: bool) -> str:
    if (name, other) == ("output.weight", "token_embd.weight"):
        return "the head is not the model's: it is a copy of the embedding (tied wrongly)"
    a, b = name.split("."), other.split(".")
    if not mutual:
        return f"holds the weights of {other}"
    if len(a) == len(b) == 4 and a[2:] == b[2:]:
        first, second = sorted((int(a[1]), int(b[1])))
        return f"layers {first} and {second} are swapped"
    if len(a) == len(b) == 4 and a[1] == b[1]:
        words = sorted(_PARTS.get(part[2], part[2]) for part in (a, b))
        words[1] = words[1].rpartition("expert's ")[2].rpartition("experts' ")[2]  # of the same
        return f"{words[0]} and {words[1]} are swapped"
    return f"holds the weights of {other}"


def _unexplained(names: list[str], proof: WeightsProof) -> str:
    """No known fault: how much of the model is in it tells a stale file from another model's."""
    failed = [tensor for tensor in proof.failed if tensor.name in names]
    worst = max(failed, key=lambda tensor: tensor.error)
    most = len(names) > len(proof.tensors) / 2
    near = float(np.median([tensor.error for tensor in failed])) < 1.0
    whose = "another model" if not near else "another state of this model (an older checkpoint?)"
    what = f"the weights are those of {whose}" if most else "other numbers than the model's"
    return (
        f"{what}: {len(names)} of {len(proof.tensors)} tensors, such as {worst.name}: relative error "
        f"{worst.error:.2g}, and {worst.type.name} makes {worst.honest:.2g} of these weights"
    )


def _listed(names: list[str]) -> str:
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{count}, first {names[0]}" if len(names) > 1 else f"{names[0]}"
