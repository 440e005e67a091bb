"""What a run must carry over beside weights: dropout's random numbers, buffers, a tied head."""

import torch
from torch import nn
from torch.nn import functional as F


class Drops(nn.Module):
    def __init__(self, vocab_size, block_size, width=48, num_layers=2, dropout=0.2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.h = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.mix = nn.Linear(width, width, bias=False)
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.02)
        self.dropout = dropout
        self.register_buffer("mask", torch.ones(block_size, block_size).tril())
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("angles", torch.arange(width) * 0.01, persistent=False)

    def forward(self, ids, targets=None, segment_ids=None):
        T = ids.shape[1]
        if self.training:
            self.seen += 1
        x = self.wte(ids) + self.wpe(torch.arange(T, device=ids.device)) + self.angles
        scores = (x @ x.transpose(1, 2)) / x.shape[-1] ** 0.5
        scores = scores.masked_fill(self.mask[:T, :T] == 0, float("-inf"))
        x = x + self.mix(scores.softmax(-1) @ x)
        for layer in self.h:
            x = x + F.dropout(F.gelu(layer(x)), self.dropout, self.training)
        logits = self.lm_head(self.ln_f(x))
        return (logits if targets is not None else logits[:, [-1]]), None
