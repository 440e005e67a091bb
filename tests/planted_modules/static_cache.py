"""A decoder with a static cache, as docs/lab.md shows it: one shape in decoding, whatever the text."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__()
        self.head_dim = dim // n_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, places, kept):
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if kept is None:  # training: nothing is written
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # decoding: written at the tokens' places of buffers that never change size
            k, v = kept[0].index_copy_(2, places, k), kept[1].index_copy_(2, places, v)
            seen = torch.arange(k.shape[2], device=x.device) <= places[:, None]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Decoder(nn.Module):
    def __init__(self, vocab_size, dim, n_layers, n_heads, n_kv_heads, max_tokens):
        super().__init__()
        self.embed, self.places = nn.Embedding(vocab_size, dim), nn.Embedding(max_tokens, dim)
        self.layers = nn.ModuleList([Attention(dim, n_heads, n_kv_heads) for _ in range(n_layers)])
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.embed.weight

    def new_cache(self, batch_size, max_tokens):
        shape = (batch_size, self.layers[0].k_proj.out_features // self.layers[0].head_dim)
        shape += (max_tokens, self.layers[0].head_dim)
        weight = self.head.weight
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers]

    def forward(self, ids, input_pos=None, cache=None):
        places = torch.arange(ids.shape[1], device=ids.device) if input_pos is None else input_pos
        x = self.embed(ids) + self.places(places)
        for number, layer in enumerate(self.layers):
            x = x + layer(x, places, None if cache is None else cache[number])
        return self.head(x)
