"""The state-space recurrence of Mamba-2, computed in chunks by matrix products.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T,    y_t = C_t^T S_t

Inside a chunk it is a masked attention without softmax; between chunks only the states are carried.
Steps, decays and states are fp32; what enters the large products has the precision of x.
Source: Dao and Gu 2024 (SSD), section 6, listing 1.

Shapes: R rows, T tokens, c chunks of Q tokens, G groups of heads that share B and C, H heads of a
group, P channels of a head, N states.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from mule.models import native_mamba


class Inputs(NamedTuple):
    """x (R, T, G, H, P); dt (R, T, G, H) fp32, after its softplus; A (G, H) fp32, negative; B and C
    (R, T, G, N)."""

    x: torch.Tensor
    dt: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor


def ssd(
    inputs: Inputs,
    chunk_size: int,
    *,
    segments: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (R, T, G, H, P) and the state (R, G, N, H P) behind the last token, both fp32.

    `state` is the one before the first token, 0 when not given. With `segments` (R, T), the number of
    each token's document, nothing passes from one document to the next.
    """
    length = inputs.x.shape[1]
    chunk_size = min(chunk_size, length)
    missing = -length % chunk_size
    x, dt, a, b, c = inputs
    if missing:  # no time passes in what is added: the state stays
        x, dt, b, c = (_padded(tensor, missing) for tensor in (x, dt, b, c))
        if segments is not None:
            segments = torch.cat((segments, segments[:, -1:].expand(-1, missing)), 1)
    x, dt, b, c = (t.unflatten(1, (-1, chunk_size)) for t in (x, dt, b, c))
    documents = None if segments is None else _Documents(segments.unflatten(1, (-1, chunk_size)))
    log_decay = _log_decay(dt * a, documents)
    dtx = dt[..., None] * x  # (R, c, Q, G, H, P) fp32

    y = _within_chunks(dtx.to(x.dtype), log_decay, b, c, documents)
    added = _added_states(dtx, log_decay, b, documents)
    before, last = _carried(added, log_decay[:, :, -1], documents, state)
    y = y + _from_states(before, log_decay, c, documents)
    return y.flatten(1, 2)[:, :length], last


class _Documents:
    """Which tokens of a chunk (R, c, Q) belong together."""

    def __init__(self, segments: torch.Tensor) -> None:
        self.segments = segments
        first = segments[:, :1, 0]  # a state that is given belongs to the row's first document
        previous = torch.cat((first, segments[:, :-1, -1]), 1)  # (R, c), before each chunk
        same = segments[..., :, None] == segments[..., None, :]
        self.visible = same & _causal(segments)
        self.since_before = segments == previous[..., None]
        self.until_end = segments == segments[..., -1:]
        self.throughout = segments[..., -1] == previous


def _log_decay(steps: torch.Tensor, documents: _Documents | None) -> torch.Tensor:
    """What each token's state has decayed by since the chunk began, or its document; (R, c, Q, G, H).

    The sum over a document's tokens alone is a product with a mask: where a running sum is subtracted
    again, the gradients of other documents vanish but for rounding.
    """
    if documents is None:
        return steps.cumsum(2)
    mask = documents.visible.to(steps.dtype)
    return (mask @ steps.flatten(3)).view_as(steps)


def _within_chunks(
    dtx: torch.Tensor,
    log_decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    documents: _Documents | None,
) -> torch.Tensor:
    """What tokens get of their own chunk, (R, c, Q, G, H, P) fp32."""
    scores = c.transpose(2, 3) @ b.permute(0, 1, 3, 4, 2)  # (R, c, G, Q, Q): one for all its heads
    weights = _weights(scores, log_decay, documents)
    return (weights @ dtx.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5).float()


def _weights(
    scores: torch.Tensor, log_decay: torch.Tensor, documents: _Documents | None
) -> torch.Tensor:
    """What a chunk's tokens weigh for later ones, (R, c, G, H, Q, Q), for scores (R, c, G, Q, Q)."""
    if native_mamba.decays(scores):
        return native_mamba.decayed(scores, log_decay, documents and documents.segments)
    visible = _causal(scores)
    if documents is not None:
        visible = documents.visible[:, :, None, None]
    decay = log_decay.permute(0, 1, 3, 4, 2)
    # Masked before exp: above the diagonal it would overflow, and its gradient be NaN.
    decay = (decay[..., :, None] - decay[..., None, :]).masked_fill(~visible, -math.inf).exp()
    return (scores[:, :, :, None] * decay).to(scores.dtype)


def _added_states(
    dtx: torch.Tensor, log_decay: torch.Tensor, b: torch.Tensor, documents: _Documents | None
) -> torch.Tensor:
    """What each chunk adds to the state behind it, (R, c, G, N, H P) fp32."""
    left = (log_decay[:, :, -1:] - log_decay).exp()  # of a token's share at the chunk's end
    if documents is not None:
        left = left * documents.until_end[..., None, None]
    share = (dtx * left[..., None]).to(b.dtype).flatten(4)  # (R, c, Q, G, H P)
    return (b.permute(0, 1, 3, 4, 2) @ share.transpose(2, 3)).float()


def _carried(
    added: torch.Tensor,
    log_decay: torch.Tensor,
    documents: _Documents | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states before each chunk, (R, c, G, N, H P), and the one behind the last."""
    decay = log_decay.exp()  # (R, c, G, H), of a whole chunk
    if documents is not None:
        decay = decay * documents.throughout[..., None, None]
    channels = added.shape[-1] // decay.shape[-1]
    decay = decay[:, :, :, None, :, None].expand(*decay.shape[:3], 1, -1, channels).flatten(4)
    current = torch.zeros_like(added[:, 0]) if state is None else state
    before = []
    for chunk in range(added.shape[1]):
        before.append(current)
        current = torch.addcmul(added[:, chunk], decay[:, chunk], current)
    return torch.stack(before, 1), current


def _from_states(
    before: torch.Tensor, log_decay: torch.Tensor, c: torch.Tensor, documents: _Documents | None
) -> torch.Tensor:
    """What tokens get of the chunks before theirs, (R, c, Q, G, H, P) fp32."""
    left = log_decay.exp()
    if documents is not None:
        left = left * documents.since_before[..., None, None]
    y = (c.transpose(2, 3) @ before.to(c.dtype)).transpose(2, 3)  # (R, c, Q, G, H P)
    return y.unflatten(-1, (left.shape[-1], -1)).float() * left[..., None]


def ssd_step(inputs: Inputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token (T = 1) behind `state` (R, G, N, H P); y and the new state, as `ssd` gives them."""
    x, dt, a, b, c = (t if t is inputs.a else t[:, 0] for t in inputs)
    decay = (dt * a).exp()[..., None].expand(x.shape).flatten(2)  # (R, G, H P)
    dtx = (dt[..., None] * x).flatten(2)
    state = state * decay[:, :, None] + b.float()[..., None] * dtx[:, :, None]
    y = (c.float()[:, :, None] @ state)[:, :, 0]
    return y.view_as(x)[:, None], state


def _causal(tokens: torch.Tensor) -> torch.Tensor:
    """(Q, Q) bool for Q tokens along the last axis: each sees itself and what came before."""
    size = tokens.shape[-1]
    return torch.ones(size, size, dtype=torch.bool, device=tokens.device).tril()


def _padded(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    """With zeros for tokens behind the last."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
