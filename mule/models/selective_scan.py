"""The recurrence of Mamba-1, where each state of a channel has a decay of its own.

    h_t = exp(dt_t a) h_{t-1} + dtx_t b_t,    y_t = c_t^T h_t

No product of matrices computes it. A few tokens at a time are one compiled kernel, in which the
state stays in the processor's cache; the backward pass computes the states of a piece again from the
one before it. One opaque operation for the compiler around it. Source: Gu and Dao 2023, algorithm 2.

Shapes: R rows, T tokens, I channels, N states; everything is fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

_PIECE = 16  # tokens of a kernel: more take longer to compile, and not less to run (docs/log.md)
_FOREVER = torch.finfo(torch.float32).max  # a step after which nothing remains


@torch.library.custom_op("mule::selective_scan", mutates_args=())
def selective_scan(
    inputs: list[torch.Tensor], begins: torch.Tensor, state: torch.Tensor, fused: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y (R, T, I), the states before each piece (pieces, R, I, N), and the last one (R, I, N).

    `inputs`: dt and dtx (R, T, I), a (I, N) negative, b and c (R, T, N). Where `begins` (R, T) nothing
    of earlier tokens remains. `state` (R, I, N) is the one before the first; it gets no gradient.
    `fused` compiles the pieces.
    """
    dt, dtx, a, b, c = inputs
    kernel = _fused(_forward) if fused else _forward
    y, last, before = _outputs(dt, state)
    with torch.no_grad():  # always, so that a kernel serves training and evaluation
        passing = dt.masked_fill(begins[..., None], _FOREVER)
        for rows in _rows(dt):
            h = state[rows]
            for piece, part in enumerate(_parts(dt)):
                before[piece, rows] = h
                named = _pieces((passing, dtx, b, c), rows, part)
                y_part, h = kernel(h, a.detach(), *named)
                y[rows, part] = y_part[:, : y[rows, part].shape[1]]
            last[rows] = h
    return y, before, last


@selective_scan.register_fake
def _(inputs, begins, state, fused):  # type: ignore[no-untyped-def]
    y, last, before = _outputs(inputs[0], state)
    return y, before, last


def _outputs(
    dt: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for y, the last state and the states before each piece."""
    before = state.new_empty(-(-dt.shape[1] // _PIECE), *state.shape)
    return torch.empty_like(dt), torch.empty_like(state), before


@torch.library.custom_op("mule::selective_scan_backward", mutates_args=())
def _backward(
    grad_y: torch.Tensor,
    inputs: list[torch.Tensor],
    begins: torch.Tensor,
    before: torch.Tensor,
    fused: bool,
) -> list[torch.Tensor]:
    """The gradients of the inputs."""
    dt, dtx, a, b, c = inputs
    kernel = _fused(_reverse) if fused else _reverse
    grads = [torch.empty_like(tensor) for tensor in (dt, dtx, b, c)]
    passing = dt.masked_fill(begins[..., None], _FOREVER)
    grad_a = torch.zeros_like(a)
    for rows in _rows(dt):
        grad_h = torch.zeros_like(before[0, rows])
        for piece, part in reversed(list(enumerate(_parts(dt)))):
            named = _pieces((grad_y, dt, passing, dtx, b, c), rows, part)
            *found, grad_h, more = kernel(grad_h, before[piece, rows], a.detach(), *named)
            grad_a += more
            for grad, value in zip(grads, found, strict=True):
                grad[rows, part] = value[:, : grad[rows, part].shape[1]]
    return [*grads[:2], grad_a, *grads[2:]]


@_backward.register_fake
def _(grad_y, inputs, begins, before, fused):  # type: ignore[no-untyped-def]
    return [torch.empty_like(tensor) for tensor in inputs]


def _set_up(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tensors, begins, _state, ctx.fused = inputs
    ctx.save_for_backward(*tensors, begins, output[1])


def _differentiate(ctx, grad_y, _grad_before, _grad_last):  # type: ignore[no-untyped-def]
    *tensors, begins, before = ctx.saved_tensors
    gradients = _backward(grad_y.contiguous(), tensors, begins, before, ctx.fused)
    return gradients, None, None, None


selective_scan.register_autograd(_differentiate, setup_context=_set_up)


def _rows(dt: torch.Tensor) -> Iterator[slice]:
    """The rows that are computed together: on a processor one, whose state its cache holds."""
    step = 1 if dt.device.type == "cpu" else len(dt)
    return (slice(start, start + step) for start in range(0, len(dt), step))


def _parts(dt: torch.Tensor) -> Iterator[slice]:
    """The tokens of each piece."""
    return (slice(start, start + _PIECE) for start in range(0, dt.shape[1], _PIECE))


def _pieces(tensors: tuple[torch.Tensor, ...], rows: slice, part: slice) -> Iterator[torch.Tensor]:
    """A piece of each tensor (R, T, ...); no time passes in what the last one lacks.

    Their strides do not depend on T: the kernels are compiled for them.
    """
    for tensor in tensors:
        piece = tensor[rows, part].detach()
        missing = _PIECE - piece.shape[1]
        if missing:
            piece = F.pad(piece, (0, 0, 0, missing))
        yield piece.flatten(0, 1).view(-1, _PIECE, piece.shape[2])


def _forward(
    h: torch.Tensor,
    a: torch.Tensor,
    dt: torch.Tensor,
    dtx: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (R, piece, I) of a piece behind the state h (R, I, N), and the state behind it."""
    found = []
    for t in range(_PIECE):
        h = (dt[:, t, :, None] * a).exp() * h + dtx[:, t, :, None] * b[:, t, None]
        found.append((h * c[:, t, None]).sum(-1))
    return torch.stack(found, 1), h


def _reverse(
    grad_h: torch.Tensor, h: torch.Tensor, a: torch.Tensor, *pieces: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The gradients of dt, dtx, b, c and h of a piece behind h, and its part of a's.

    `grad_h` is that of the state behind it. The pieces are those of y's gradient, of dt, of dt as time
    passes (forever where a document begins), of dtx, b and c.
    """
    grad_y, dt, passing, dtx, b, c = pieces
    states = [h]
    for t in range(_PIECE):
        decay = (passing[:, t, :, None] * a).exp()
        states.append(decay * states[-1] + dtx[:, t, :, None] * b[:, t, None])
    found: list[tuple[torch.Tensor, ...]] = []
    grad_a = torch.zeros_like(h)
    for t in reversed(range(_PIECE)):
        grad_h = grad_h + grad_y[:, t, :, None] * c[:, t, None]
        grad_dtx, grad_b = (grad_h * b[:, t, None]).sum(-1), dtx[:, t, None] @ grad_h
        grad_h = grad_h * (passing[:, t, :, None] * a).exp()
        through = grad_h * states[t]
        grad_a = grad_a + through * dt[:, t, :, None]
        grad_c = grad_y[:, t, None] @ states[t + 1]
        found.append(((through * a).sum(-1), grad_dtx, grad_b[:, 0], grad_c[:, 0]))
    gradients = (torch.stack(parts, 1) for parts in zip(*found[::-1], strict=True))
    return *gradients, grad_h, grad_a.sum(0)


@functools.cache
def _fused(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel compiled, when it is first needed: the compiler alone takes seconds to import."""
    return torch.compile(kernel, dynamic=False)
