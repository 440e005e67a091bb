"""Causal self-attention with grouped key/value heads.

Shapes: B rows, T tokens, H query heads, K key/value heads, D channels of a head, E hidden channels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mule.models.cache import KVCache
from mule.models.config import ModelConfig
from mule.models.norm import RMSNorm
from mule.models.packed_attention import packed_attention
from mule.models.rope import apply_rope

_DENSE_TOKENS = 512  # up to this length a mask costs less than going by document (docs/log.md)


class Attention(nn.Module):
    """Multi-head (K = H), grouped-query (1 < K < H) or multi-query (K = 1) attention with RoPE.

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 for the groups.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.qk_norm = config.qk_norm
        self.head_dim = config.head_dim
        self.grouped = config.num_kv_heads != config.num_heads
        self.layer = layer
        self.compiled = False  # whether the parts that the compiler does not see are compiled too

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        visible: torch.Tensor | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """(B, T, E) -> (B, T, E); `visible` is None for plain causal rows, else a mask (bool, over
        queries and keys) or the documents of packed rows (`visible_within`)."""
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(rows, length, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(rows, length, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rope(q.transpose(1, 2), *angles)
        k = apply_rope(k.transpose(1, 2), *angles)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if visible is not None and visible.dtype != torch.bool:
            y, _ = packed_attention(q, k, v, visible, self.compiled)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=self.grouped
            )
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))


def visible_within(segments: torch.Tensor) -> torch.Tensor:
    """What a token sees of its row when attention stays inside documents: segments (B, T) as they
    are where attention goes by document, else a mask."""
    if segments.device.type == "cpu" and segments.shape[1] > _DENSE_TOKENS:
        return segments
    return document_mask(segments)


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, T) bool for segments (B, T): causal, and only inside the same document.

    Padding (segment 0) sees padding, so that no row of the softmax is empty.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]
