"""Caches driven in other ways, experts in one tensor, and a choice made over the whole sequence."""

import torch
from torch import nn
from torch.nn import functional as F


class Attends(nn.Module):
    """One layer of attention over learned positions, and a head."""

    def __init__(self, vocab_size, dim):
        super().__init__()
        self.embed, self.places = nn.Embedding(vocab_size, dim), nn.Embedding(64, dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def attend(self, x, keys, values, seen):
        y = F.scaled_dot_product_attention(self.q(x), keys, values, attn_mask=seen)
        return self.head(x + y)


class InPositions(Attends):
    """As Llama's own code: a number says where the tokens begin, the cache is inside."""

    def __init__(self, vocab_size, dim):
        super().__init__(vocab_size, dim)
        self.kept = None

    def forward(self, tokens, start_pos=0):
        at = torch.arange(start_pos, start_pos + tokens.shape[1])
        x = self.embed(tokens) + self.places(at)
        keys, values = self.k(x), self.v(x)
        if start_pos:
            keys = torch.cat((self.kept[0][:, :start_pos], keys), 1)
            values = torch.cat((self.kept[1][:, :start_pos], values), 1)
        self.kept = (keys.detach(), values.detach())
        return self.attend(x, keys, values, torch.arange(keys.shape[1]) <= at[:, None])


class ByPlaces(Attends):
    """As gpt-fast: buffers are set up, and positions are a tensor."""

    def setup_caches(self, max_batch_size, max_seq_length):
        size = (max_batch_size, max_seq_length, self.q.in_features)
        self.register_buffer("keys", torch.zeros(size), persistent=False)
        self.register_buffer("values", torch.zeros(size), persistent=False)

    def forward(self, idx, input_pos=None):
        if input_pos is None:
            input_pos = torch.arange(idx.shape[1])
            keys, values = None, None
        else:
            keys, values = self.keys, self.values
        x = self.embed(idx) + self.places(input_pos)
        if keys is None:
            keys, values = self.k(x), self.v(x)
        else:
            keys[:, input_pos], values[:, input_pos] = self.k(x), self.v(x)
        seen = torch.arange(keys.shape[1]) <= input_pos[:, None]
        return self.attend(x, keys, values, seen)


class MadeCache(Attends):
    """The module makes a cache, which is handed in and filled."""

    def new_cache(self, batch_size, max_tokens):
        return {"keys": [], "values": []}

    def forward(self, ids, cache=None):
        first = sum(part.shape[1] for part in cache["keys"]) if cache else 0
        at = torch.arange(first, first + ids.shape[1])
        x = self.embed(ids) + self.places(at)
        cache = cache or {"keys": [], "values": []}
        cache["keys"].append(self.k(x))
        cache["values"].append(self.v(x))
        keys, values = torch.cat(cache["keys"], 1), torch.cat(cache["values"], 1)
        return self.attend(x, keys, values, torch.arange(keys.shape[1]) <= at[:, None])


class Stacked(Attends):
    """Experts in one tensor, one a token."""

    def __init__(self, vocab_size, dim):
        super().__init__(vocab_size, dim)
        self.gate = nn.Linear(dim, 4, bias=False)
        self.experts = nn.Parameter(0.1 * torch.randn(4, dim, dim))

    def forward(self, ids):
        x = self.embed(ids).cumsum(1)
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        made = torch.einsum("btd,edf->btef", x, self.experts)
        one = made.take_along_dim(chosen[..., None, None], 2)[:, :, 0]
        return self.head(x + weight[..., None] * one)


class LastDecides(Attends):
    """The last token of the whole sequence turns the sign of all logits."""

    def forward(self, ids):
        return self.head(self.embed(ids).cumsum(1)) * (1 - 2 * (ids[:, -1] % 2))[:, None, None]
