"""What the experts of a mixture compute, in C++ (mule/native/experts.h), on torch's tensors.

Shapes as in `experts`, whose functions these are: S rows in the experts' order, `bounds` where the
experts' parts end, D hidden channels, F channels inside an expert.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from mule.models import native_training

_CHANNELS = 32  # a multiple of: whole vectors, and whole pairs of bf16
_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p


def serves(x: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether the experts of x (N, D), with `down` (E, D, F), can be computed here."""
    _, hidden, inner = down.shape
    return hidden % _CHANNELS == inner % _CHANNELS == 0 and native_training.serves(x)


def multiplies_bf16() -> bool:
    """Whether the products are here: of bf16, where the processor multiplies pairs of it."""
    return hasattr(native_training.library(), "mule_multiply_experts")


def multiply(
    rows: torch.Tensor, matrices: torch.Tensor, bounds: Sequence[int], out: torch.Tensor
) -> None:
    """out (S, B): rows (S, A), each times its expert's of `matrices` (E, A, B); not of no expert."""
    is_transposed = not matrices.is_contiguous()
    stored = matrices.transpose(1, 2) if is_transposed else matrices
    _require_contiguous(rows, stored, out)
    room = _room(0, *matrices.shape)
    where = (rows, stored, _ends(bounds), *matrices.shape, is_transposed, room, out)
    _call("mule_multiply_experts", *where)


def multiply_transposed(
    left: torch.Tensor, right: torch.Tensor, bounds: Sequence[int], out: torch.Tensor
) -> None:
    """out (E, A, B): of each expert's rows, left (S, A) transposed times right (S, B)."""
    _require_contiguous(left, right, out)
    room = _room(bounds[-1], *out.shape)
    _call("mule_multiply_experts_transposed", left, right, _ends(bounds), *out.shape, room, out)


def swiglu(
    inner: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, bounds: Sequence[int]
) -> torch.Tensor:
    """(S, F): of inner (S, 2 F), gate beside up, silu(gate) * up * the assignment's weight."""
    _require_contiguous(inner, weights, order)
    hidden = inner.new_empty(len(inner), inner.shape[1] // 2)
    size = hidden.shape[1]
    _call("mule_swiglu", order, bounds[-1], _is_bf16(inner), inner, weights, size, hidden)
    return hidden


def swiglu_backward(
    grad_hidden: torch.Tensor,
    inner: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    bounds: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`swiglu`'s result again, and the gradients of inner and the weights.

    `grad_hidden` is before the weights; the result takes its place.
    """
    _require_contiguous(grad_hidden, inner, weights, order)
    grad_inner, grad_weights = torch.empty_like(inner), torch.zeros_like(weights)
    _call(
        "mule_swiglu_backward",
        *(order, bounds[-1], _is_bf16(inner), inner, weights, grad_hidden.shape[1]),
        *(grad_hidden, grad_inner, grad_weights),
    )
    return grad_hidden, grad_inner, grad_weights


def sum_by_token(
    rows: torch.Tensor, order: torch.Tensor, top_k: int, bounds: Sequence[int]
) -> torch.Tensor:
    """(N, D): the sums of each token's rows (S, D)."""
    _require_contiguous(rows, order)
    y = rows.new_empty(len(order) // top_k, rows.shape[1])
    places = torch.empty_like(order)
    _call(
        "mule_sum_by_token",
        *(order, bounds[-1], _is_bf16(rows), rows, len(y), top_k, rows.shape[1], places, y),
    )
    return y


# ---------------------------------------------------------------- calling


def _ends(bounds: Sequence[int]) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int64)


def _room(rows: int, num_experts: int, a: int, b: int) -> torch.Tensor:
    """torch's, so that a lack of memory is met as any other."""
    threads = torch.get_num_threads()
    library = native_training.library()
    assert library is not None
    words = library.mule_experts_room(*map(_LONG, (rows, num_experts, a, b, threads)))
    return torch.empty(words, dtype=torch.int32)


def _is_bf16(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _call(name: str, *given: torch.Tensor | int) -> None:
    passed = [_POINTER(g.data_ptr()) if isinstance(g, torch.Tensor) else _LONG(g) for g in given]
    getattr(native_training.library(), name)(*passed, _LONG(torch.get_num_threads()))


def _require_contiguous(*tensors: torch.Tensor) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors)
