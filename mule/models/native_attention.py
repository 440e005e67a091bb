"""Attention by document in C++ (mule/native/attention.h), on tensors where torch has them.

Shapes as in `packed_attention`: B rows, T tokens, H query heads, K key/value heads, D channels of a
head. Three to four times as fast as torch's on a processor with bf16 products, twice in fp32
(docs/log.md).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from mule.models import native_training

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_CHANNELS = 16  # of a head, a multiple of: whole vectors on every processor

Documents = Sequence[tuple[int, int, int]]  # (row, start, end) of each


class _Tensor(ctypes.Structure):
    """`Tensor` of attention.h."""

    _fields_ = (("data", _POINTER), ("row", _LONG), ("head", _LONG), ("token", _LONG))


_TENSORS = ("q", "k", "v", "y", "grad_y", "grad_q", "grad_k", "grad_v")


class _Job(ctypes.Structure):
    """`Job` of attention.h."""

    _fields_ = (
        *((name, _LONG) for name in ("is_bf16", "heads", "kv_heads", "tokens", "head_dim")),
        *((name, _LONG) for name in ("threads", "window")),
        ("scale", ctypes.c_double),
        ("num_documents", _LONG),
        ("documents", _POINTER),
        *((name, _Tensor) for name in _TENSORS),
        *((name, _POINTER) for name in ("lse", "head_grad_k", "head_grad_v", "room")),
        ("room_bytes", _LONG),
    )


def serves(tensor: torch.Tensor, head_dim: int) -> bool:
    """Whether tensors like this one can be attended to here."""
    return head_dim % _CHANNELS == 0 and native_training.serves(tensor)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    *,
    window: int | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, H, T, D) and the log-sum-exp (B, H, T) fp32, both 0 outside the documents."""
    rows, heads, length, head_dim = q.shape
    y = q.new_zeros(rows, length, heads, head_dim).transpose(1, 2)  # as the projection reads it
    lse = q.new_zeros(rows, heads, length, dtype=torch.float32)
    _call("mule_attention", {"q": q, "k": k, "v": v, "y": y}, documents, window, scale, lse=lse)
    return y, lse


def backward(
    grad_y: torch.Tensor,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    outputs: tuple[torch.Tensor, torch.Tensor],
    documents: Documents,
    *,
    window: int | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, which are the `inputs`; `outputs` are what `forward` gave."""
    (q, k, v), (y, lse) = inputs, outputs
    grad_q, grad_k, grad_v = (
        torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)
    )
    tensors = {"q": q, "k": k, "v": v, "y": y, "grad_y": grad_y}
    tensors |= {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    shared = {}
    if q.shape[1] != k.shape[1]:  # summed over the query heads of a group afterwards
        shared = {f"head_grad_{name}": q.new_empty(q.shape, dtype=torch.float32) for name in "kv"}
    _call("mule_attention_backward", tensors, documents, window, scale, lse=lse, **shared)
    return grad_q, grad_k, grad_v


def _call(
    function: str,
    tensors: dict[str, torch.Tensor],
    documents: Documents,
    window: int | None,
    scale: float | None,
    **sums: torch.Tensor,
) -> None:
    library, q = native_training.library(), tensors["q"]
    assert library is not None
    held = {name: t if t.stride(-1) == 1 else t.contiguous() for name, t in tensors.items()}
    places = torch.tensor(documents, dtype=torch.int64).view(-1, 3)
    threads, head_dim = torch.get_num_threads(), q.shape[-1]
    job = _Job(
        is_bf16=q.dtype == torch.bfloat16,
        heads=q.shape[1],
        kv_heads=tensors["k"].shape[1],
        tokens=q.shape[2],
        head_dim=head_dim,
        threads=threads,
        window=window or 0,
        scale=1 / math.sqrt(head_dim) if scale is None else scale,
        num_documents=len(places),
        documents=places.data_ptr(),
        **{name: _Tensor(t.data_ptr(), *t.stride()[:3]) for name, t in held.items()},
        **{name: t.data_ptr() for name, t in sums.items()},
    )
    job.room_bytes = library.mule_attention_room(ctypes.byref(job))
    # torch's, so that a lack of memory is met as any other.
    room = torch.empty(threads * job.room_bytes, dtype=torch.uint8)
    job.room = room.data_ptr()
    getattr(library, function)(ctypes.byref(job))
