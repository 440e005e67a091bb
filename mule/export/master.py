"""The file of 16 bits a number that is kept, and that quantised files are made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from mule.errors import ModelError
from mule.export.families import expected_weights, read_shape
from mule.export.gguf import Weights, plan_tensors
from mule.generate.weight_rows import NotFiniteError, WeightRows

_F16_MAX = 65504.0
_LOW_HALF = 0xFFFF  # bits of a float32 that bfloat16 drops
_SLICE_WEIGHTS = 2**20


@dataclass(frozen=True)
class Master:
    """The type of the kept file, and in words why this one and what it costs."""

    type_name: str
    why: str


@dataclass
class _Fit:
    """What holds for all matrices that were looked at."""

    bf16: bool = True  # every number is one of bfloat16
    f16: bool = True
    largest: float = 0.0


def choose_master(model_dir: Path) -> Master:
    """bf16 or f16, whichever holds the model's matrices exactly; else f16 unless it overflows.

    Raises ModelError for NaN and infinity.
    """
    matrices = _matrices(model_dir)
    dtypes = {rows.dtype for rows in matrices.values()}
    if dtypes in ({"BF16"}, {"F16"}):
        own = dtypes.pop().lower()
        return Master(own, f"the weights are {own}, so the {own} master holds them exactly")
    fit = _Fit()
    for name, rows in matrices.items():
        _look(fit, name, rows)
    if fit.bf16:
        return Master("bf16", "every weight is a bf16 number, so the bf16 master is exact")
    if fit.f16:
        return Master("f16", "every weight is an f16 number, so the f16 master is exact")
    if fit.largest <= _F16_MAX:
        return Master("f16", "the f16 master rounds the weights to 11 bits")
    return Master(
        "bf16",
        f"weights reach {fit.largest:.3g} and f16 ends at {_F16_MAX:.0f}: the bf16 master rounds "
        "them to 8 bits",
    )


def _matrices(model_dir: Path) -> dict[str, WeightRows]:
    """The weights that such a file rounds: small ones stay in float32."""
    family, shape = read_shape(model_dir)
    weights = Weights(model_dir)
    expected = expected_weights(family, shape, set(weights.files))
    weights.check(expected)
    plan = plan_tensors(family, shape, expected, "f16")
    sources = [part.source for t in plan for part in t.parts if t.type == GGMLQuantizationType.F16]
    return {name: weights.rows(weights.whole(name)) for name in dict.fromkeys(sources)}


def _look(fit: _Fit, name: str, rows: WeightRows) -> None:
    step = max(1, _SLICE_WEIGHTS // rows.num_columns)
    for first in range(0, rows.num_rows, step):
        try:
            values = rows.values(first, min(first + step, rows.num_rows))
        except NotFiniteError:
            raise ModelError(
                f"{name} holds NaN or infinite values", "export an earlier checkpoint"
            ) from None
        if fit.bf16:
            fit.bf16 = not (values.view(np.uint32) & _LOW_HALF).any()
        if fit.f16:
            with np.errstate(over="ignore"):
                fit.f16 = bool((values.astype(np.float16).astype(np.float32) == values).all())
        fit.largest = max(fit.largest, float(np.abs(values).max()))
