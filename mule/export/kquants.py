"""Q4_K, Q5_K and Q6_K blocks in NumPy, for machines without llama.cpp.

A block holds 256 weights: 8 groups of 32 with scale and minimum (Q4_K, Q5_K), or 16 groups of 16
with a signed scale (Q6_K). Equal to llama.cpp's blocks but for sums in another order.
Source: make_qkx2_quants, make_qx_quants and quantize_row_q{4,5,6}_K_ref in ggml/src/ggml-quants.c
of llama.cpp b11549.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

Floats = npt.NDArray[Any]  # float32, and
Bytes = npt.NDArray[Any]  # uint8; numpy's annotations widen both at every operation

_BLOCK = 256
_BLOCKS_AT_ONCE = 4096  # keeps the working arrays within a few tens of MB
_SMALLEST = 1e-15  # GROUP_MAX_EPS: below it a group counts as zero


def _in_pieces(rows: Floats, encode: Callable[[Floats], Bytes]) -> Bytes:
    """(rows, columns) -> (rows, bytes a row), a bounded number of blocks at a time."""
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, _BLOCK)
    parts = [
        encode(blocks[start : start + _BLOCKS_AT_ONCE])
        for start in range(0, len(blocks), _BLOCKS_AT_ONCE)
    ]
    return np.concatenate(parts).reshape(len(rows), -1)


def _fit_scale_and_min(x: Floats, levels: int, first: float, steps: int) -> tuple[Floats, Floats]:
    """Scale and minimum (both n) so that scale * (0..levels) - minimum is nearest to x (n, 32)."""
    weights = np.sqrt(np.mean(x * x, axis=1, keepdims=True)) + np.abs(x)
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
    for step in range(steps + 1):
        # `low` is the best so far, not the first: the search moves with it.
        inverse = np.float32(first + 0.1 * step + levels) / np.where(flat, 1, high - low)
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


def _six_bits(values: Floats) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """The float16 unit (n, 1) and the codes 0..63 (n, 8) of non-negative values (n, 8)."""
    largest = values.max(1, keepdims=True).clip(min=0)
    inverse = np.divide(63, largest, out=np.zeros_like(largest), where=largest > 0)
    unit = (largest / 63).astype(np.float16)
    return unit, np.clip(np.rint(inverse * values), 0, 63).astype(np.uint8)


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


def _groups_of_32(blocks: Floats, levels: int, first: float, steps: int) -> tuple[Bytes, Bytes]:
    """The 16 bytes before the codes, and the codes (n, 8, 32), of Q4_K and Q5_K blocks."""
    x = blocks.reshape(-1, 32)
    scale, minimum = _fit_scale_and_min(x, levels, first, steps)
    unit, scales = _six_bits(scale.reshape(-1, 8))
    unit_min, mins = _six_bits(minimum.reshape(-1, 8))
    real_scale = (unit.astype(np.float32) * scales)[..., None]
    real_min = (unit_min.astype(np.float32) * mins)[..., None]
    divisor = np.where(real_scale == 0, 1, real_scale)
    codes = np.clip(np.rint((x.reshape(-1, 8, 32) + real_min) / divisor), 0, levels)
    codes = np.where(real_scale == 0, 0, codes).astype(np.uint8)
    units = np.concatenate((unit.view(np.uint8), unit_min.view(np.uint8)), axis=1)
    return np.concatenate((units, _pack_scales(scales, mins)), axis=1), codes


def _q4_k(blocks: Floats) -> Bytes:
    head, codes = _groups_of_32(blocks, 15, -1.0, 20)
    pairs = codes.reshape(-1, 4, 2, 32)
    nibbles = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return np.concatenate((head, nibbles.reshape(-1, 128)), axis=1)


def _q5_k(blocks: Floats) -> Bytes:
    head, codes = _groups_of_32(blocks, 31, -0.5, 15)
    pairs = (codes & 15).reshape(-1, 4, 2, 32)
    nibbles = pairs[:, :, 0] | pairs[:, :, 1] << 4
    bits = np.arange(8, dtype=np.uint8)[:, None]
    fifth = np.bitwise_or.reduce((codes >> 4) << bits, axis=1)  # (n, 32): bit g is group g's
    return np.concatenate((head, fifth, nibbles.reshape(-1, 128)), axis=1)


def _fit_signed_scale(x: Floats, levels: int) -> Floats:
    """The scale (n) so that scale * (-levels..levels-1) is nearest to x (n, 16), weighted by x²."""
    rows = np.arange(len(x))
    peak = x[rows, np.abs(x).argmax(1)]
    empty = np.abs(peak) < _SMALLEST
    peak = np.where(empty, 1, peak)
    scale = best = np.zeros(len(x), np.float32)
    # The plain scale comes first, then its neighbours: ties keep the earlier one.
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -np.float32(levels + 0.1 * step) / peak
        code = np.clip(np.rint(inverse[:, None] * x), -levels, levels - 1)
        weights = x * x
        sum_lx, sum_l2 = (weights * x * code).sum(1), (weights * code * code).sum(1)
        if step == 0:
            better = sum_l2 > 0
        else:
            better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        new_scale = sum_lx / np.where(sum_l2 > 0, sum_l2, 1)
        scale = np.where(better, new_scale, scale)
        best = np.where(better, new_scale * sum_lx, best)
    return np.where(empty, 0, scale).astype(np.float32)


def _q6_k(blocks: Floats) -> Bytes:
    x = blocks.reshape(-1, 16, 16)
    scale = _fit_signed_scale(x.reshape(-1, 16), 32).reshape(-1, 16)
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


KQUANTS: dict[GGMLQuantizationType, Callable[[Floats], Bytes]] = {
    GGMLQuantizationType.Q4_K: lambda rows: _in_pieces(rows, _q4_k),
    GGMLQuantizationType.Q5_K: lambda rows: _in_pieces(rows, _q5_k),
    GGMLQuantizationType.Q6_K: lambda rows: _in_pieces(rows, _q6_k),
}
