"""What goes wrong in writing experts and state-space layers, as what a tensor would hold then."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from mule.export.families.shape import ModelShape, Recurrence

Values = npt.NDArray[np.float32]
Fits = Callable[[Values], bool]  # whether the file holds these numbers, but for what blocks lose

_SKETCH = 64  # numbers of each expert that are looked at to find it again


def mixer_faults(
    name: str, found: Values, wanted: Values, shape: ModelShape, fits: Fits
) -> Iterator[str]:
    """The faults that explain a tensor; `found` and `wanted` are its rows."""
    part = name.split(".")[2] if name.startswith("blk.") else name
    if part.endswith("_exps") and shape.experts is not None:
        yield from _other_experts(found, wanted, shape.experts.count, fits)
    if part == "ssm_a":
        yield from _decay(wanted, fits)
    if part == "ssm_conv1d" and name.endswith(".weight"):
        if fits(np.ascontiguousarray(wanted[:, ::-1])):
            yield "the convolution of a Mamba layer runs backwards"
    if part == "ssm_in" and shape.ssm is not None:
        yield from _halves(wanted, shape.ssm, fits)
    if part == "ssm_d" and not found.any():
        yield "D of a Mamba layer was forgotten: nothing but zeros"


def _other_experts(found: Values, wanted: Values, count: int, fits: Fits) -> Iterator[str]:
    """Experts in another order: each is found again by its nearest."""
    experts = wanted.reshape(count, -1)
    theirs, ours = found.reshape(count, -1)[:, :_SKETCH], experts[:, :_SKETCH]
    distances = np.square(theirs[:, None] - ours[None]).sum(-1, dtype=np.float64)
    order = distances.argmin(1)
    moved = np.flatnonzero(order != np.arange(count))
    if len(moved) < 2 or not fits(experts[order].reshape(wanted.shape)):
        return
    if len(moved) == 2 and order[moved[0]] == moved[1]:
        yield f"experts {moved[0]} and {moved[1]} are swapped"
    else:
        yield f"{len(moved)} of {count} experts are in another order"


def _decay(wanted: Values, fits: Fits) -> Iterator[str]:
    if fits(-wanted):
        yield "A of a Mamba layer has the wrong sign: states would grow where they must fade"
    if (wanted < 0).all() and fits(np.log(-wanted)):
        yield "A of a Mamba layer is its logarithm: A_log is in the place of -exp(A_log)"


def _halves(wanted: Values, ssm: Recurrence, fits: Fits) -> Iterator[str]:
    first, second = wanted[: ssm.inner], wanted[ssm.inner : 2 * ssm.inner]
    if fits(np.concatenate([second, first, wanted[2 * ssm.inner :]])):
        yield "x and z of a Mamba layer are swapped"
