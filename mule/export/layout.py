"""How llama.cpp keeps a model's weights: what writing changes in them, and the way back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mule.export.families import Family, ModelShape, interleave_heads


def to_llama_cpp(
    family: Family, shape: ModelShape, name: str, values: npt.NDArray
) -> npt.NDArray[np.float32]:
    """A weight of the folder, by its name there, as the file holds it."""
    if heads := turned_heads(family, shape, name):
        values = interleave_heads(values, heads)
    return values + np.float32(norm_offset(family, name)) if norm_offset(family, name) else values


def from_llama_cpp(
    family: Family, shape: ModelShape, name: str, values: npt.NDArray
) -> npt.NDArray[np.float32]:
    """A tensor of the file as the weight `name` of the folder: the inverse of `to_llama_cpp`."""
    if heads := turned_heads(family, shape, name):
        values = part_heads(values, heads)
    return values - np.float32(norm_offset(family, name)) if norm_offset(family, name) else values


def part_heads(weight: npt.NDArray, num_heads: int) -> npt.NDArray:
    """Rows of q or k: from neighbouring pairs back to the two halves of each head."""
    rows = weight.shape[0] // num_heads
    split = weight.reshape(num_heads, rows // 2, 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def turned_heads(family: Family, shape: ModelShape, name: str) -> int:
    """The heads of a weight whose rows are interleaved; 0 for all others."""
    if not family.permuted:
        return 0
    return shape.heads * (".q_proj." in name) + shape.kv_heads * (".k_proj." in name)


def norm_offset(family: Family, name: str) -> float:
    """What is added to a weight: Gemma saves its norms less one."""
    return family.norm_offset if name.endswith("norm.weight") else 0.0
