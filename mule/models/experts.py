"""What the experts of a mixture compute for the tokens that were assigned to them.

Shapes: N tokens, k experts of each, E experts, D hidden channels, F channels inside an expert; S = N k
assignments, numbered token by token.

On the CPU, and wherever `F.grouped_mm` cannot be compiled, one operation that is opaque to the
compiler goes from expert to expert. Its gradients are written by hand: autograd's, of an expert's slice
of the stacked weights, would fill a tensor as large as all of them for each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch.nn import functional as F

from mule.models import native_experts, torch_experts


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
    return torch_experts.sum_by_token(
        y * weights.flatten()[order, None].to(y.dtype), order, top_k, ()
    )


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
    between, products = _kernels(x, down)
    inner = x.new_empty(len(order), gate_up.shape[1])
    products.multiply(x.index_select(0, order // top_k), gate_up.transpose(1, 2), bounds, inner)
    hidden = between.swiglu(inner, weights, order, bounds)
    out = x.new_empty(len(order), x.shape[1])
    products.multiply(hidden, down.transpose(1, 2), bounds, out)
    return between.sum_by_token(out, order, top_k, bounds), inner


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
    between, products = _kernels(x, down)
    tokens = order // top_k
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)

    grad_rows = grad_y.index_select(0, tokens)
    grad_hidden = inner.new_empty(len(order), down.shape[2])
    products.multiply(grad_rows, down, bounds, grad_hidden)  # before the router's weight
    hidden, grad_inner, grad_weights = between.swiglu_backward(
        grad_hidden, inner, weights, order, bounds
    )
    products.multiply_transposed(grad_rows, hidden, bounds, grad_down)
    del grad_hidden, hidden

    rows = torch.index_select(x, 0, tokens, out=grad_rows)
    products.multiply_transposed(grad_inner, rows, bounds, grad_gate_up)
    products.multiply(grad_inner, gate_up, bounds, rows)
    grad_x = between.sum_by_token(rows, order, top_k, bounds)
    return grad_x, grad_weights, grad_gate_up, grad_down


@_backward.register_fake
def _(grad_y, inner, inputs):  # type: ignore[no-untyped-def]
    x, weights, _, _, gate_up, down = inputs
    return tuple(torch.empty_like(t) for t in (x, weights, gate_up, down))


def _kernels(x: torch.Tensor, down: torch.Tensor) -> tuple[ModuleType, ModuleType]:
    """What computes between the products, and the products; in C++ where that is there."""
    if not native_experts.serves(x, down):
        return torch_experts, torch_experts
    multiplies = x.dtype == torch.bfloat16 and native_experts.multiplies_bf16()
    return native_experts, native_experts if multiplies else torch_experts


def _set_up(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, grad_y, _grad_inner):  # type: ignore[no-untyped-def]
    *inputs, inner = ctx.saved_tensors
    grad_x, grad_weights, *grads = _backward(grad_y.contiguous(), inner, inputs)
    return grad_x, grad_weights, None, None, *grads


_experts.register_autograd(_differentiate, setup_context=_set_up)
