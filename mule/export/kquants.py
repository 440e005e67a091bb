"""Q4_K, Q5_K and Q6_K blocks in NumPy, for machines without llama.cpp.

A block holds 256 weights: 8 groups of 32 with scale and minimum (Q4_K, Q5_K), or 16 groups of 16
with a signed scale (Q6_K). Equal to llama.cpp's blocks but for sums in another order. Given the
importance of each column, errors are weighed by it and the search is finer, as in llama.cpp.
Source: make_qkx2_quants, make_qkx3_quants, make_qp_quants, make_qx_quants and
quantize_row_q{4,5,6}_K_{ref,impl} in ggml/src/ggml-quants.c of llama.cpp b11549.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

Floats = npt.NDArray[Any]  # float32, and
Bytes = npt.NDArray[Any]  # uint8; numpy's annotations widen both at every operation

_BLOCK = 256
_BLOCKS_AT_ONCE = 4096  # keeps the working arrays within a few tens of MB
_SMALLEST = 1e-15  # GROUP_MAX_EPS: below it a group counts as zero
_ROUNDS = 5  # of improving the codes of scales one by one


class _Search(NamedTuple):
    """The scales tried: those with `levels` + first + delta * step levels, step by step."""

    first: float
    delta: float
    steps: int


_WEIGHED_SEARCH = _Search(-0.9, 0.05, 36)


def _in_pieces(
    rows: Floats,
    importance: Floats | None = None,
    *,
    encode: Callable[[Floats, Floats | None], Bytes],
) -> Bytes:
    """(rows, columns) -> (rows, bytes a row), a bounded number of blocks at a time."""
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, _BLOCK)
    weights = None if importance is None else importance.reshape(-1, _BLOCK)
    parts = []
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = blocks[start : start + _BLOCKS_AT_ONCE]
        own = None
        if weights is not None:
            own = weights[np.arange(start, start + len(part)) % len(weights)]
        parts.append(encode(part, own))
    return np.concatenate(parts).reshape(len(rows), -1)


def _fit_scale_and_min(
    x: Floats, weights: Floats, levels: int, search: _Search
) -> tuple[Floats, Floats]:
    """Scale and minimum (both n) so that scale * (0..levels) - minimum is nearest to x (n, 32)."""
    sum_w, sum_x = weights.sum(1), (weights * x).sum(1)
    low, high = np.minimum(x.min(1), 0), x.max(1)
    flat = high == low
    span = np.where(flat, 1, high - low).astype(np.float32)
    scale = span / levels

    def codes(inverse: Floats, low: Floats) -> Floats:
        return np.clip(np.rint(inverse[:, None] * (x - low[:, None])), 0, levels)

    def error(scale: Floats, low: Floats, code: Floats) -> Floats:
        return (weights * (scale[:, None] * code + low[:, None] - x) ** 2).sum(1)

    best = error(scale, low, codes(levels / span, low))
    for step in range(search.steps + 1):
        # `low` is the best so far, not the first: the search moves with it.
        wanted = np.float32(search.first + search.delta * step + levels)
        inverse = wanted / np.where(flat, 1, high - low)
        code = codes(inverse.astype(np.float32), low)
        sum_l, sum_l2 = (weights * code).sum(1), (weights * code * code).sum(1)
        sum_xl = (weights * code * x).sum(1)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        valid = determinant > 0
        divisor = np.where(valid, determinant, 1)
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / divisor
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / divisor
        positive = new_low > 0
        new_scale = np.where(positive, sum_xl / np.where(sum_l2 > 0, sum_l2, 1), new_scale)
        new_low = np.where(positive, 0, new_low)
        new_error = error(new_scale, new_low, code)
        better = valid & (new_error < best)
        best = np.where(better, new_error, best)
        scale, low = np.where(better, new_scale, scale), np.where(better, new_low, low)
    return np.where(flat, 0, scale).astype(np.float32), (-low).astype(np.float32)


def _six_bits(values: Floats, weights: Floats | None) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """The float16 unit (n, 1) and the codes 0..63 (n, 8) of non-negative values (n, 8)."""
    if weights is not None:
        return _fit_unit(values, weights, 63)
    largest = values.max(1, keepdims=True).clip(min=0)
    inverse = np.divide(63, largest, out=np.zeros_like(largest), where=largest > 0)
    unit = (largest / 63).astype(np.float16)
    return unit, np.clip(np.rint(inverse * values), 0, 63).astype(np.uint8)


def _fit_unit(values: Floats, weights: Floats, levels: int) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """`_six_bits` with the squared errors of the values weighed: make_qp_quants."""
    largest = values.max(1, keepdims=True)
    empty = largest < _SMALLEST
    largest = np.where(empty, 1, largest)

    def codes(inverse: Floats) -> Floats:
        return np.clip(np.rint(inverse * values), 0, levels)

    inverse, best = largest, np.full_like(largest, np.inf)
    for step in (0, *range(-4, 0), *range(1, 5)):
        tried = np.float32(levels + 0.1 * step) / largest
        error = (weights * (values - codes(tried) / tried) ** 2).sum(1, keepdims=True)
        inverse = np.where(error < best, tried, inverse)
        best = np.minimum(error, best)
    code = codes(inverse)
    sum_lx = (weights * values * code).sum(1)
    sum_l2 = (weights * code * code).sum(1)
    for _ in range(_ROUNDS):
        before = code.copy()
        for i in range(values.shape[1]):
            x, w, old = values[:, i], weights[:, i], code[:, i]
            lx, l2 = sum_lx - w * x * old, sum_l2 - w * old * old
            usable = (lx > 0) & (l2 > 0)
            new = np.clip(np.rint(x * l2 / np.where(usable, lx, 1)), 0, levels)
            lx, l2 = lx + w * x * new, l2 + w * new * new
            better = usable & (new != old) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            code[:, i] = np.where(better, new, old)
            sum_lx, sum_l2 = np.where(better, lx, sum_lx), np.where(better, l2, sum_l2)
        if np.array_equal(before, code):
            break
    unit = np.divide(sum_lx, sum_l2, out=np.zeros_like(sum_lx), where=sum_l2 > 0)[:, None]
    unit, code = np.where(empty, 0, unit), np.where(empty, 0, code)
    return unit.astype(np.float16), code.astype(np.uint8)


def _pack_scales(scales: npt.NDArray[np.uint8], mins: npt.NDArray[np.uint8]) -> Bytes:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    low_scales, high_scales = scales[:, :4], scales[:, 4:]
    low_mins, high_mins = mins[:, :4], mins[:, 4:]
    return np.concatenate(
        (
            low_scales | (high_scales >> 4) << 6,
            low_mins | (high_mins >> 4) << 6,
            (high_scales & 15) | (high_mins & 15) << 4,
        ),
        axis=1,
    )


def _groups_of_32(
    blocks: Floats, importance: Floats | None, levels: int, search: _Search
) -> tuple[Bytes, Bytes]:
    """The 16 bytes before the codes, and the codes (n, 8, 32), of Q4_K and Q5_K blocks."""
    x, group_weights = blocks.reshape(-1, 32), None
    if importance is None:
        weights = np.sqrt(np.mean(x * x, axis=1, keepdims=True)) + np.abs(x)
    else:
        spread = 2 * np.mean(blocks * blocks, axis=1, keepdims=True)
        weights = (importance * np.sqrt(spread + blocks * blocks)).reshape(-1, 32)
        group_weights, search = weights.sum(1).reshape(-1, 8), _WEIGHED_SEARCH
    scale, minimum = _fit_scale_and_min(x, weights, levels, search)
    unit, scales = _six_bits(scale.reshape(-1, 8), group_weights)
    unit_min, mins = _six_bits(minimum.reshape(-1, 8), group_weights)
    real_scale = (unit.astype(np.float32) * scales)[..., None]
    real_min = (unit_min.astype(np.float32) * mins)[..., None]
    divisor = np.where(real_scale == 0, 1, real_scale)
    codes = np.clip(np.rint((x.reshape(-1, 8, 32) + real_min) / divisor), 0, levels)
    codes = np.where(real_scale == 0, 0, codes).astype(np.uint8)
    units = np.concatenate((unit.view(np.uint8), unit_min.view(np.uint8)), axis=1)
    return np.concatenate((units, _pack_scales(scales, mins)), axis=1), codes


def _q4_k(blocks: Floats, importance: Floats | None) -> Bytes:
    head, codes = _groups_of_32(blocks, importance, 15, _Search(-1.0, 0.1, 20))
    pairs = codes.reshape(-1, 4, 2, 32)
    nibbles = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return np.concatenate((head, nibbles.reshape(-1, 128)), axis=1)


def _q5_k(blocks: Floats, importance: Floats | None) -> Bytes:
    head, codes = _groups_of_32(blocks, importance, 31, _Search(-0.5, 0.1, 15))
    pairs = (codes & 15).reshape(-1, 4, 2, 32)
    nibbles = pairs[:, :, 0] | pairs[:, :, 1] << 4
    bits = np.arange(8, dtype=np.uint8)[:, None]
    fifth = np.bitwise_or.reduce((codes >> 4) << bits, axis=1)  # (n, 32): bit g is group g's
    return np.concatenate((head, fifth, nibbles.reshape(-1, 128)), axis=1)


def _fit_signed_scale(x: Floats, weights: Floats, levels: int) -> Floats:
    """The scale (n) so that scale * (-levels..levels-1) is nearest to x (n, 16)."""
    rows = np.arange(len(x))
    peak = x[rows, np.abs(x).argmax(1)]
    empty = np.abs(peak) < _SMALLEST
    peak = np.where(empty, 1, peak)
    scale = best = np.zeros(len(x), np.float32)
    # The plain scale comes first, then its neighbours: ties keep the earlier one.
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -np.float32(levels + 0.1 * step) / peak
        code = np.clip(np.rint(inverse[:, None] * x), -levels, levels - 1)
        sum_lx, sum_l2 = (weights * x * code).sum(1), (weights * code * code).sum(1)
        if step == 0:
            better = sum_l2 > 0
        else:
            better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        new_scale = sum_lx / np.where(sum_l2 > 0, sum_l2, 1)
        scale = np.where(better, new_scale, scale)
        best = np.where(better, new_scale * sum_lx, best)
    return np.where(empty, 0, scale).astype(np.float32)


def _q6_k(blocks: Floats, importance: Floats | None) -> Bytes:
    x = blocks.reshape(-1, 16, 16)
    groups = x.reshape(-1, 16)
    weights = groups * groups if importance is None else importance.reshape(-1, 16)
    scale = _fit_signed_scale(groups, weights, 32).reshape(-1, 16)
    rows = np.arange(len(scale))
    largest = scale[rows, np.abs(scale).argmax(1)][:, None]
    empty = np.abs(largest) < _SMALLEST
    inverse = np.float32(-128) / np.where(empty, 1, largest)
    unit = np.where(empty, 0, 1 / inverse).astype(np.float16)
    scales = np.where(empty, 0, np.minimum(127, np.rint(inverse * scale))).astype(np.int8)
    real = (unit.astype(np.float32) * scales)[..., None]
    codes = np.clip(np.rint(x / np.where(real == 0, 1, real)), -32, 31) + 32
    codes = np.where(empty[..., None], 0, np.where(real == 0, 32, codes)).astype(np.uint8)
    quarters = codes.reshape(-1, 2, 4, 32)  # halves of 128, each four runs of 32
    low = quarters & 15
    nibbles = np.concatenate(
        (low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4), 2
    )
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = np.bitwise_or.reduce((quarters >> 4) << shifts, axis=2)
    parts = (nibbles.reshape(-1, 128), high.reshape(-1, 64), scales.view(np.uint8))
    return np.concatenate((*parts, unit.view(np.uint8)), axis=1)


# (rows, columns) float32, and (columns) or None for their importance -> (rows, bytes a row)
KQUANTS: dict[GGMLQuantizationType, Callable[..., Bytes]] = {
    GGMLQuantizationType.Q4_K: partial(_in_pieces, encode=_q4_k),
    GGMLQuantizationType.Q5_K: partial(_in_pieces, encode=_q5_k),
    GGMLQuantizationType.Q6_K: partial(_in_pieces, encode=_q6_k),
}
