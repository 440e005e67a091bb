"""What the experts of a mixture compute, operation by operation in torch.

Shapes: S rows in the experts' order, `bounds` where the experts' parts end, E experts, D hidden
channels, F channels inside an expert. Rows behind the last part belong to no expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F


def multiply(
    rows: torch.Tensor, matrices: torch.Tensor, bounds: Sequence[int], out: torch.Tensor
) -> None:
    """out (S, B): rows (S, A), each times its expert's of `matrices` (E, A, B); of no expert, 0."""
    for expert, part in _parts(bounds):
        torch.mm(rows[part], matrices[expert], out=out[part])
    out[bounds[-1] :] = 0.0


def multiply_transposed(
    left: torch.Tensor, right: torch.Tensor, bounds: Sequence[int], out: torch.Tensor
) -> None:
    """out (E, A, B): of each expert's rows, left (S, A) transposed times right (S, B)."""
    for expert, part in _parts(bounds):
        torch.mm(left[part].T, right[part], out=out[expert])


def _parts(bounds: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows, none perhaps: a product of nothing is 0."""
    start = 0
    for expert, end in enumerate(bounds):
        yield expert, slice(start, end)
        start = end


def swiglu(
    inner: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, _: Sequence[int]
) -> torch.Tensor:
    """(S, F): of inner (S, 2 F), gate beside up, silu(gate) * up * the assignment's weight."""
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).mul_(weights.flatten()[order, None])


def swiglu_backward(
    grad_hidden: torch.Tensor,
    inner: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    _: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`swiglu`'s result again, and the gradients of inner and the weights.

    `grad_hidden` is before the weights, and is overwritten.
    """
    factor = weights.flatten()[order, None]
    gate, up = inner.chunk(2, dim=-1)
    grad_inner, grad_weights = torch.empty_like(inner), torch.empty_like(weights)
    grad_gate, grad_up = grad_inner.chunk(2, dim=-1)  # room for other things first
    activated = torch.ops.aten.silu.out(gate, out=grad_up)
    hidden = activated * up
    grad_weights.view(-1)[order] = torch.mul(grad_hidden, hidden, out=grad_gate).sum(-1)
    grad_up.mul_(grad_hidden.mul_(factor))
    torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
    return hidden.mul_(factor), grad_inner, grad_weights


def sum_by_token(
    rows: torch.Tensor, order: torch.Tensor, top_k: int, _: Sequence[int]
) -> torch.Tensor:
    """(N, D): the sums of each token's rows (S, D)."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return rows.index_select(0, place).view(-1, top_k, rows.shape[1]).sum(1)
