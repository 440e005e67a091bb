"""Memory that runs out: recognised, and explained where nothing helps any more."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch

from mule.config.schema import Recipe
from mule.errors import UserError

# What allocators other than torch's for CUDA, and the libraries on them, say instead of a type.
_WORDS = (
    "can't allocate memory",
    "MPS backend out of memory",
    "could not create a memory object",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the system refused memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def free_memory() -> None:
    """Give back what a failed attempt left; its exception must be gone, it holds the tensors."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def explained(recipe: Recipe, rows_at_once: Callable[[], int]) -> Iterator[None]:
    """Turn memory that ran out inside the block into a UserError that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).splitlines() or ["MemoryError"])[0]
        raise UserError(f"out of memory: {said}", _remedy(recipe, rows_at_once())) from error


def _remedy(recipe: Recipe, rows_at_once: int) -> str:
    ways = [f"train.micro_batch_rows (now {rows_at_once})"] if rows_at_once > 1 else []
    ways.append(f"data.max_seq_length (now {recipe.data.max_seq_length})")
    told = f"lower {' or '.join(ways)}"
    if recipe.train.activation_checkpointing != "full":
        told += ", set train.activation_checkpointing=full"
    return f"{told}, or take a smaller model"
