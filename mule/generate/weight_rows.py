"""The rows of a stored matrix, some at a time, for whoever writes them in another type.

The child process that quantises reads them by itself, so nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80}  # all of these bits are set in NaN and infinity


class NotFiniteError(ValueError):
    """Values that are NaN or infinite, or are so in float32."""


@dataclass(frozen=True)
class WeightRows:
    """A matrix of a file: `num_rows` rows of `num_columns` numbers of `dtype`, from byte `start`.

    `heads`: the rows come in llama.cpp's order, which interleaves the halves of each head.
    `added` is added to every number. `decay`: the numbers are logarithms of what a state-space
    layer's states lose, and -exp of them is meant.
    """

    file: str
    start: int
    dtype: str
    num_rows: int
    num_columns: int
    heads: int = 0
    added: float = 0.0
    decay: bool = False

    @property
    def as_stored(self) -> bool:
        """Whether the numbers are those of the file."""
        return not self.added and not self.decay

    def stored(self, first: int, last: int) -> npt.NDArray:
        """Rows as they are stored; bfloat16 as uint16. NotFiniteError for NaN and infinity."""
        part = self._mapped[self._order[first:last] if self.heads else slice(first, last)]
        if bits := _EXPONENT.get(self.dtype):
            finite = not ((part.view(np.uint16) & bits) == bits).any()
        else:
            finite = np.isfinite(part).all()
        if not finite:
            raise NotFiniteError
        return part

    def values(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """Rows in float32, contiguous. NotFiniteError for NaN, infinity and what becomes it."""
        part = self.stored(first, last)
        if self.dtype == "BF16":
            part = (part.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(part, np.float32)
        if self.dtype == "F64" and not np.isfinite(values).all():
            raise NotFiniteError
        values = -np.exp(values) if self.decay else values
        return values + np.float32(self.added) if self.added else values

    @cached_property
    def _mapped(self) -> npt.NDArray:
        shape = (self.num_rows, self.num_columns)
        return np.memmap(self.file, _NUMPY[self.dtype], "r", self.start, shape)

    @cached_property
    def _order(self) -> npt.NDArray[np.intp]:
        return interleaved(self.num_rows, self.heads)


def interleaved(num_rows: int, num_heads: int) -> npt.NDArray[np.intp]:
    """The order of rows in which the two halves of each head become neighbouring pairs.

    Source: LlamaModel.permute in llama.cpp's conversion/llama.py.
    """
    order = np.arange(num_rows).reshape(num_heads, 2, num_rows // num_heads // 2)
    return order.swapaxes(1, 2).reshape(num_rows)
