"""How llama.cpp keeps a model's weights: what writing changes in them, and the way back.

A tensor of a file is made of parts of the folder's weights (`Part`): mostly of one whole weight, but
the experts of a layer share a tensor, and weights that hold two matrices are two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mule.export.families import Family, ModelShape, Part, interleave_heads

Values = npt.NDArray[np.float32]


def to_llama_cpp(family: Family, shape: ModelShape, name: str, values: npt.NDArray) -> Values:
    """A weight of the folder, by its name there, as the file holds it."""
    if heads := turned_heads(family, shape, name):
        values = interleave_heads(values, heads)
    if is_decay(name):
        return -np.exp(values)
    return values + np.float32(norm_offset(family, name)) if norm_offset(family, name) else values


def from_llama_cpp(family: Family, shape: ModelShape, name: str, values: npt.NDArray) -> Values:
    """A tensor of the file as the weight `name` of the folder: the inverse of `to_llama_cpp`."""
    if heads := turned_heads(family, shape, name):
        values = part_heads(values, heads)
    if is_decay(name):
        return np.log(-values)
    return values - np.float32(norm_offset(family, name)) if norm_offset(family, name) else values


def gathered(
    parts: Sequence[Part], shape: tuple[int, ...], weight: Callable[[str], npt.NDArray]
) -> Values:
    """A tensor of the file, from its parts of the weights that `weight` gives by name.

    One weight is asked for at a time, and once as long as its parts come one after another.
    """
    name, rows, found = "", np.empty(0), []
    for part in parts:
        if part.source != name:
            name, rows = part.source, as_rows(weight(part.source))
        found.append(rows[part.first : part.first + part.count])
    return (found[0] if len(found) == 1 else np.concatenate(found)).reshape(shape)


def scattered(parts: Sequence[Part], values: npt.NDArray) -> Iterator[tuple[Part, npt.NDArray]]:
    """The parts of a tensor of the file, each with its rows: the inverse of `gathered`."""
    total = sum(part.count for part in parts)
    rows, first = values.reshape(total, -1), 0
    for part in parts:
        yield part, rows[first : first + part.count]
        first += part.count


def as_rows(values: Any) -> Any:
    """An array or a tensor as (rows, numbers a row); the rows of a vector are its numbers."""
    return values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)


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


def is_decay(name: str) -> bool:
    """Whether a weight is the logarithm of what states lose: files hold -exp of it."""
    return name.endswith(".A_log")
