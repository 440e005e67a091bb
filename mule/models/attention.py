"""Causal self-attention with grouped key/value heads.

Shapes: B rows, T tokens, H query heads, K key/value heads, D channels of a head, E hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from mule.models import native_attention
from mule.models.cache import Cache
from mule.models.config import ModelConfig
from mule.models.norm import RMSNorm
from mule.models.packed_attention import packed_attention
from mule.models.rope import Angles, apply_rope

_DENSE_TOKENS = 512  # up to this length a mask costs less than going by document (docs/log.md)


class Attention(nn.Module):
    """Multi-head (K = H), grouped-query (1 < K < H) or multi-query (K = 1) attention with RoPE.

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 for the groups.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        query_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.fused = config.fused_projections
        if self.fused:
            self.qkv_proj = nn.Linear(hidden, query_size + 2 * kv_size, bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden, query_size, bias=config.qkv_bias)
            self.k_proj = nn.Linear(hidden, kv_size, bias=config.qkv_bias)
            self.v_proj = nn.Linear(hidden, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, hidden, bias=config.o_bias)
        if config.qk_norm:
            plus_one = config.norm_plus_one
            self.q_norm = RMSNorm(head_dim, config.norm_eps, plus_one=plus_one)
            self.k_norm = RMSNorm(head_dim, config.norm_eps, plus_one=plus_one)
        self.qk_norm = config.qk_norm
        self.sizes = [query_size, kv_size, kv_size]
        self.head_dim = head_dim
        self.scale = config.attention_scale
        self.window = config.sliding_window if layer in config.sliding_layers else None
        self.grouped = config.num_kv_heads != config.num_heads
        self.layer = layer
        self.compiled = False  # whether the parts that the compiler does not see are compiled too

    def forward(
        self,
        x: torch.Tensor,
        angles: Angles | None,
        visible: torch.Tensor | None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """(B, T, E) -> (B, T, E); `visible` is None for plain causal rows, else a mask (bool, over
        queries and keys) or the documents of packed rows (`visible_within`). Without `angles` the
        layer knows no positions."""
        rows, length, _ = x.shape
        q, k, v = self._projected(x)
        q = q.view(rows, length, -1, self.head_dim)  # (B, T, H, D)
        k = k.view(rows, length, -1, self.head_dim)  # (B, T, K, D)
        v = v.view(rows, length, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if angles is not None:
            q, k = apply_rope(q, *angles), apply_rope(k, *angles)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if visible is not None and visible.dtype != torch.bool:
            y, _ = packed_attention(
                q, k, v, visible, self.compiled, window=self.window, scale=self.scale
            )
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=visible,
                is_causal=visible is None,
                scale=self.scale,
                enable_gqa=self.grouped,
            )
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))

    def _projected(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """q, k and v, heads side by side."""
        if self.fused:
            return self.qkv_proj(x).split(self.sizes, dim=-1)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def visible_within(
    segments: torch.Tensor | None, x: torch.Tensor, head_dim: int
) -> torch.Tensor | None:
    """What the tokens of x (B, T, E) see of their rows when attention stays inside documents: segments
    (B, T) as they are where attention goes by document, else a mask; None for plain causal rows.

    Without `segments` a row is one document, and computed as such where that is faster.
    """
    natively = native_attention.serves(x, head_dim)
    if segments is None:
        return torch.ones(x.shape[:2], dtype=torch.int64) if natively else None
    if natively or (x.device.type == "cpu" and x.shape[1] > _DENSE_TOKENS):
        return segments
    return document_mask(segments)


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, T) bool for segments (B, T): causal, and only inside the same document.

    Padding (segment 0) sees padding, so that no row of the softmax is empty.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]


def within_window(
    visible: torch.Tensor | None, positions: torch.Tensor, window: int
) -> torch.Tensor | None:
    """`visible` for a layer whose tokens see `window` tokens, the last one themselves.

    Where attention goes by document it limits the keys itself.
    """
    length = positions.shape[1]
    if length <= window or (visible is not None and visible.dtype != torch.bool):
        return visible
    ones = torch.ones(length, length, dtype=torch.bool, device=positions.device)
    if visible is None:
        return (ones.tril() & ones.triu(1 - window))[None, None]
    return visible & ones.triu(1 - window)
