"""Grouped-query attention and a cache that is handed back; `Late` forgets the cached positions."""

import torch
from torch import nn
from torch.nn import functional as F


def turned(x, first):
    """Rotary positions, counted from `first`; x (B, H, T, D)."""
    half = x.shape[-1] // 2
    inverse = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(first, first + x.shape[2])[:, None] * inverse
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)


class Attention(nn.Module):
    counts_the_past = True

    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x, past):
        B, T, _ = x.shape
        q, k, v = (
            w(x).view(B, T, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        first = past[0].shape[2] if past is not None and self.counts_the_past else 0
        q, k = turned(q, first), turned(k, first)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # HERE: cache
        seen = torch.ones(T, k.shape[2], dtype=torch.bool).tril(k.shape[2] - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1)), (k, v)


class LateAttention(Attention):
    counts_the_past = False


class Transformer(nn.Module):
    attention = Attention

    def __init__(self, vocab_size, dim, n_layers, n_heads, n_kv_heads):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            [self.attention(dim, n_heads, n_kv_heads) for _ in range(n_layers)]
        )
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens, past_key_values=None, use_cache=False):
        x, kept = self.embed(tokens), []
        for number, layer in enumerate(self.layers):
            y, pair = layer(x, past_key_values[number] if past_key_values is not None else None)
            x = x + y
            kept.append(pair)
        logits = self.head(x)
        return {"logits": logits, "past_key_values": kept if use_cache else None}


class Late(Transformer):
    attention = LateAttention
