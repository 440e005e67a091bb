"""What the experts of a mixture compute for the tokens that were assigned to them.

Shapes: N tokens, k experts of each, E experts, D hidden channels, F channels inside an expert; S = N k
assignments, numbered token by token.

On the CPU, and wherever `F.grouped_mm` cannot be compiled, one operation that is opaque to the
compiler goes from expert to expert. Its gradients are written by hand: autograd's, of an expert's slice
of the stacked weights, would fill a tensor as large as all of them for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F


def apply_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    assigned: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum (N, D) of the experts that the tokens x (N, D) are `assigned` to (N, k) int64.

    An assignment to E is one to no expert, and adds nothing. `weights` (N, k), `gate_up` (E, 2 F, D)
    gate above up, `down` (E, D, F).
    """
    order = assigned.flatten().argsort(stable=True)
    ends = _tokens_per_expert(assigned, len(down)).cumsum(0)
    if _can_group(x, gate_up):
        return _grouped(x, weights, order, ends, gate_up, down)
    return _experts(x, weights, order, ends, gate_up, down)[0]


def _tokens_per_expert(assigned: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(E,) int64."""
    experts = torch.arange(num_experts, device=assigned.device)
    return (assigned.flatten()[:, None] == experts).sum(0)


# ---------------------------------------------------------------- one product for all experts


def _can_group(x: torch.Tensor, gate_up: torch.Tensor) -> bool:
    """Whether `F.grouped_mm` has a kernel that torch.compile takes: bf16 on a GPU, rows of whole 16
    bytes."""
    _, inner2, hidden = gate_up.shape
    is_aligned = hidden % 8 == 0 and inner2 % 16 == 0
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and is_aligned


def _grouped(
    x: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """As `_experts`: the rows are brought into the experts' order, and back."""
    top_k, offs = weights.shape[1], ends.to(torch.int32)
    is_assigned = torch.arange(len(order), device=x.device) < ends[-1]
    # Rows behind the last expert's are not computed: they, and their gradients, may hold anything.
    rows = x[order // top_k].where(is_assigned[:, None], 0.0)
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offs).chunk(2, dim=-1)
    y = F.grouped_mm((F.silu(gate) * up).contiguous(), down.transpose(1, 2), offs=offs)
    y = y.where(is_assigned[:, None], 0.0)
    return _sum_by_token(y * weights.flatten()[order, None].to(y.dtype), order, top_k)


# ---------------------------------------------------------------- expert by expert


@torch.library.custom_op("mule::experts", mutates_args=())
def _experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (N, D), and gate and up (S, 2 F) in the experts' order, which the backward pass needs.

    `order` (S,) lists the assignments by expert, `ends` (E,) where the experts' parts end. What is no
    product is done for all experts at once.
    """
    top_k, bounds = weights.shape[1], ends.tolist()
    inner = x.new_empty(len(order), gate_up.shape[1])
    _multiply(x.index_select(0, order // top_k), gate_up.transpose(1, 2), bounds, inner)
    gate, up = inner.chunk(2, dim=-1)
    hidden = F.silu(gate).mul_(up).mul_(weights.flatten()[order, None])
    out = x.new_empty(len(order), x.shape[1])
    _multiply(hidden, down.transpose(1, 2), bounds, out)
    return _sum_by_token(out, order, top_k), inner


@_experts.register_fake
def _(x, weights, order, ends, gate_up, down):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(order.shape[0], gate_up.shape[1])


@torch.library.custom_op("mule::experts_backward", mutates_args=())
def _backward(
    grad_y: torch.Tensor, inner: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, the weights, gate_up and down, for the `inputs` of `_experts`."""
    x, weights, order, ends, gate_up, down = inputs
    top_k, bounds = weights.shape[1], ends.tolist()
    tokens, factor = order // top_k, weights.flatten()[order, None]
    gate, up = inner.chunk(2, dim=-1)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    grad_inner, grad_hidden = torch.empty_like(inner), torch.empty_like(gate)
    grad_gate, grad_up = grad_inner.chunk(2, dim=-1)  # room for other things first

    grad_rows = grad_y.index_select(0, tokens)
    _multiply(grad_rows, down, bounds, grad_hidden)  # before the router's weight
    activated = torch.ops.aten.silu.out(gate, out=grad_up)
    hidden = activated * up
    grad_weights = torch.empty_like(weights)
    grad_weights.view(-1)[order] = torch.mul(grad_hidden, hidden, out=grad_gate).sum(-1)
    _multiply_transposed(grad_rows, hidden.mul_(factor), bounds, grad_down)
    del grad_rows, hidden

    grad_up.mul_(grad_hidden.mul_(factor))
    torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
    del grad_hidden
    rows = x.index_select(0, tokens)
    _multiply_transposed(grad_inner, rows, bounds, grad_gate_up)
    _multiply(grad_inner, gate_up, bounds, rows)
    return _sum_by_token(rows, order, top_k), grad_weights, grad_gate_up, grad_down


@_backward.register_fake
def _(grad_y, inner, inputs):  # type: ignore[no-untyped-def]
    x, weights, _, _, gate_up, down = inputs
    return tuple(torch.empty_like(t) for t in (x, weights, gate_up, down))


def _multiply(
    rows: torch.Tensor, matrices: torch.Tensor, bounds: Sequence[int], out: torch.Tensor
) -> None:
    """out (S, B): rows (S, A), each times its expert's of `matrices` (E, A, B); of no expert, 0."""
    for expert, part in _parts(bounds):
        torch.mm(rows[part], matrices[expert], out=out[part])
    out[bounds[-1] :] = 0.0


def _multiply_transposed(
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


def _sum_by_token(rows: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """(N, D): the sums of each token's rows (S, D), which are in the experts' order."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return rows.index_select(0, place).view(-1, top_k, rows.shape[1]).sum(1)


def _set_up(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, grad_y, _grad_inner):  # type: ignore[no-untyped-def]
    *inputs, inner = ctx.saved_tensors
    grad_x, grad_weights, *grads = _backward(grad_y.contiguous(), inner, inputs)
    return grad_x, grad_weights, None, None, *grads


_experts.register_autograd(_differentiate, setup_context=_set_up)
