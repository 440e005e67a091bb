"""Causal attention inside the documents of packed rows, on the CPU.

A dense mask computes all of (T, T) and throws most away; here documents are computed one by one, in
C++ where it can be compiled (`native_attention`). Elsewhere the forward pass is torch's flash
attention, and the backward pass batched matrix products over a block of queries and the keys its
documents begin at, with one elementwise kernel between them. One opaque operation for the compiler:
it reads `segments`, whose shape never changes. Gradients: Dao et al. 2022 (FlashAttention), appendix
B.2.

Shapes: B rows, T tokens, H query heads, K key/value heads, D channels of a head, G = H / K.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch

from mule.models import native_attention

_BLOCK = 256  # queries at once in the backward pass (docs/log.md)
_KEY_STEP = 64  # a block's keys begin at a multiple: few shapes, for which kernels are kept


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@torch.library.custom_op("mule::packed_attention", mutates_args=())
def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: torch.Tensor,
    fused: bool,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, H, T, D) and the log-sum-exp (B, H, T) fp32, for q (B, H, T, D), k and v (B, K, T, D).

    `segments` (B, T) numbers the documents of a row; padding is 0, and its y is 0. `fused` compiles
    the backward pass's elementwise kernel. A token sees the last `window` tokens of its document,
    itself included; `scale` of the scores is 1 / sqrt(D) when not given.
    """
    if native_attention.serves(q, q.shape[-1]):
        documents = list(_documents(segments))
        return native_attention.forward(q, k, v, documents, window=window, scale=scale)
    rows, heads, length, head_dim = q.shape
    y = q.new_zeros(rows, length, heads, head_dim).transpose(1, 2)  # as the projection reads it
    lse = q.new_zeros(rows, heads, length, dtype=torch.float32)
    group = heads // k.shape[1]
    for row, start, end in _documents(segments):
        part = (slice(row, row + 1), slice(None), slice(start, end))
        keys, values = k[part], v[part]
        if group > 1:
            keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
        if window is None or end - start <= window:
            y[part], lse[part] = _flash(q[part], keys, values, is_causal=True, scale=scale)
            continue
        for first in range(0, end - start, _BLOCK):  # places inside the document
            last = min(first + _BLOCK, end - start)
            oldest = max(0, first - window + 1)
            own = (slice(row, row + 1), slice(None), slice(start + first, start + last))
            near = (slice(None), slice(None), slice(oldest, last))
            seen = _visible(segments[row, start:end], first, oldest, last, window)
            mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -math.inf)
            y[own], lse[own] = _flash(
                q[own], keys[near], values[near], attn_mask=mask[None, None], scale=scale
            )
    return y, lse


@packed_attention.register_fake
def _(q, k, v, segments, fused, *, window=None, scale=None):  # type: ignore[no-untyped-def]
    rows, heads, length, head_dim = q.shape
    y = q.new_empty(rows, length, heads, head_dim).transpose(1, 2)
    return y, q.new_empty(rows, heads, length, dtype=torch.float32)


@torch.library.custom_op("mule::packed_attention_backward", mutates_args=())
def _backward(
    grad_y: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    segments: torch.Tensor,
    fused: bool,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    if native_attention.serves(q, q.shape[-1]):
        documents = list(_documents(segments))
        return native_attention.backward(
            grad_y, (q, k, v), (y, lse), documents, window=window, scale=scale
        )
    kernel = _fused_kernel() if fused else _kernel
    rows, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    grad_k = k.new_zeros(rows, kv_heads, length, head_dim, dtype=torch.float32)
    grad_v = torch.zeros_like(grad_k)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    split = (rows, kv_heads, heads // kv_heads, length)  # query heads by the head they share
    q5, g5 = (t.unflatten(1, split[1:3]) for t in (q, grad_y))
    out5 = grad_q.view(*split, head_dim)
    delta = (grad_y * y).sum(-1, dtype=torch.float32)
    lse4, delta4 = lse.view(split), delta.view(split)
    for row, start, first, end in _blocks(segments, window):
        block = (row, slice(None), slice(None), slice(start, end))
        keys = (row, slice(None), slice(first, end))
        queries = q5[block].flatten(1, 2)  # (K, G * block, D)
        grads = g5[block].flatten(1, 2)
        p, grad_s = kernel(
            queries @ k[keys].mT,  # (K, G * block, keys)
            grads @ v[keys].mT,
            lse4[block].flatten(1),
            delta4[block].flatten(1),
            _visible(segments[row], start, first, end, window),
            scale,
        )
        grad_v[keys] += p.mT @ grads
        grad_k[keys] += grad_s.mT @ queries
        out5[block] = (grad_s @ k[keys]).unflatten(1, (-1, end - start))
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_backward.register_fake
def _(grad_y, q, k, v, y, lse, segments, fused, *, window=None, scale=None):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _set_up(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.fused = inputs
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad_y, _grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, segments, y, lse = ctx.saved_tensors
    gradients = _backward(grad_y, q, k, v, y, lse, segments, ctx.fused, **ctx.options)
    return *gradients, None, None


packed_attention.register_autograd(_differentiate, setup_context=_set_up)


def _visible(
    segments: torch.Tensor, start: int, first: int, end: int, window: int | None
) -> torch.Tensor:
    """Which of the keys first..end the queries start..end see, (queries, keys) bool."""
    places = torch.arange(first, end)
    queries = torch.arange(start, end)[:, None]
    seen = (segments[start:end, None] == segments[first:end]) & (places <= queries)
    return seen if window is None else seen & (places > queries - window)


def _kernel(
    scores: torch.Tensor,
    grad_p: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and the scores' gradient, for unscaled scores; both (K, G * queries, keys)."""
    hidden = ~visible.repeat(scores.shape[1] // len(visible), 1)
    p = (scores.float() * scale - lse[..., None]).masked_fill(hidden, -math.inf).exp()
    grad_s = p * (grad_p.float() - delta[..., None]) * scale
    return p.to(scores.dtype), grad_s.to(scores.dtype)


@functools.cache
def _fused_kernel() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`_kernel` compiled, when it is first needed: the compiler alone takes seconds to import."""
    return torch.compile(_kernel, dynamic=True)


def _edges(segments: torch.Tensor) -> list[int]:
    """Where the documents of a row (T,) begin, and where the last one ends: padding is left out."""
    inner = (segments.diff() != 0).nonzero().flatten() + 1
    edges = [0, *inner.tolist(), len(segments)]
    return edges[:-1] if segments[-1] == 0 else edges


def _documents(segments: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, start, end) of every document."""
    for row, ids in enumerate(segments):
        for start, end in itertools.pairwise(_edges(ids)):
            yield row, start, end


def _blocks(segments: torch.Tensor, window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """(row, first query, first key, end of both) of the blocks that hold a row's documents."""
    for row, ids in enumerate(segments):
        edges = _edges(ids)
        for start in range(0, edges[-1], _BLOCK):
            oldest = edges[bisect.bisect_right(edges, start) - 1]  # where its first document begins
            if window is not None:
                oldest = max(oldest, start - window + 1)
            first = oldest // _KEY_STEP * _KEY_STEP
            yield row, start, first, min(start + _BLOCK, edges[-1])
