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

_silu_backward = torch.ops.aten.silu_backward


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
    num_tokens, top_k = weights.shape
    offs = ends.to(torch.int32)
    is_assigned = torch.arange(len(order), device=x.device) < ends[-1]
    # Rows behind the last expert's are not computed: they, and their gradients, may hold anything.
    rows = x[order // top_k].where(is_assigned[:, None], 0.0)
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offs).chunk(2, dim=-1)
    y = F.grouped_mm((F.silu(gate) * up).contiguous(), down.transpose(1, 2), offs=offs)
    y = y.where(is_assigned[:, None], 0.0)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=x.device)
    by_token = y[place].view(num_tokens, top_k, -1)
    return (by_token * weights[..., None].to(y.dtype)).sum(1)


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

    `order` (S,) lists the assignments by expert, `ends` (E,) where the experts' parts end.
    """
    y, inner = torch.zeros_like(x), x.new_empty(len(order), gate_up.shape[1])
    flat_weights = weights.flatten()
    for expert, part, chosen, tokens in _parts(order, ends, weights.shape[1]):
        both = torch.mm(x.index_select(0, tokens), gate_up[expert].T, out=inner[part])
        gate, up = both.chunk(2, dim=-1)
        hidden = F.silu(gate).mul_(up).mul_(flat_weights[chosen, None])
        y.index_add_(0, tokens, hidden @ down[expert].T)
    return y, inner


@_experts.register_fake
def _(x, weights, order, ends, gate_up, down):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(order.shape[0], gate_up.shape[1])


@torch.library.custom_op("mule::experts_backward", mutates_args=())
def _backward(
    grad_y: torch.Tensor, inner: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, the weights, gate_up and down, for the `inputs` of `_experts`."""
    x, weights, order, ends, gate_up, down = inputs
    grad_x, flat_weights = torch.zeros_like(x), weights.flatten()
    grad_weights = torch.zeros_like(flat_weights)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    for idle in (ends.diff(prepend=ends.new_zeros(1)) == 0).nonzero().flatten().tolist():
        grad_gate_up[idle], grad_down[idle] = 0.0, 0.0
    width = gate_up.shape[1] // 2
    for expert, part, chosen, tokens in _parts(order, ends, weights.shape[1]):
        gate, up = inner[part].chunk(2, dim=-1)
        activated, factor = F.silu(gate), flat_weights[chosen, None]
        hidden, grad_rows = activated * up, grad_y.index_select(0, tokens)
        grad_hidden = grad_rows @ down[expert]  # before the router's weight
        grad_weights[chosen] = (grad_hidden * hidden).sum(-1)
        torch.mm(grad_rows.T, hidden.mul_(factor), out=grad_down[expert])
        grad_hidden.mul_(factor)
        grad_inner = torch.empty_like(inner[part])
        torch.mul(grad_hidden, activated, out=grad_inner[:, width:])
        grad_inner[:, :width] = _silu_backward(grad_hidden.mul_(up), gate)
        torch.mm(grad_inner.T, x.index_select(0, tokens), out=grad_gate_up[expert])
        grad_x.index_add_(0, tokens, grad_inner @ gate_up[expert])
    return grad_x, grad_weights.view_as(weights), grad_gate_up, grad_down


@_backward.register_fake
def _(grad_y, inner, inputs):  # type: ignore[no-untyped-def]
    x, weights, _, _, gate_up, down = inputs
    return tuple(torch.empty_like(t) for t in (x, weights, gate_up, down))


def _parts(
    order: torch.Tensor, ends: torch.Tensor, top_k: int
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """Of each expert that has tokens: its number, its part of `order`, the assignments in it, and
    their tokens. A GPU is waited for here, once."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            chosen = order[start:end]
            yield expert, slice(start, end), chosen, chosen // top_k
        start = end


def _set_up(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, grad_y, _grad_inner):  # type: ignore[no-untyped-def]
    *inputs, inner = ctx.saved_tensors
    grad_x, grad_weights, *grads = _backward(grad_y.contiguous(), inner, inputs)
    return grad_x, grad_weights, None, None, *grads


_experts.register_autograd(_differentiate, setup_context=_set_up)
