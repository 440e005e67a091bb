"""A mixture of experts as most repositories write it: a Python loop over the experts."""

import torch
from torch import nn
from torch.nn import functional as F


class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, config.ff, bias=False)
        self.w2 = nn.Linear(config.ff, config.n_embd, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)))


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.n_embd, config.num_experts, bias=False)
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.num_experts)])
        self.top_k = config.top_k

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(self.top_k)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)  # HERE: where
            if token.numel() == 0:
                continue
            out[token] += weights[token, place, None] * expert(flat[token])
        largest = weights.max().item()  # HERE: item
        if largest > 1:
            print("router", largest)  # HERE: print
        return out.view_as(x)


class MoEModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.mix = nn.Conv1d(config.n_embd, config.n_embd, 3, padding=2)
        self.moe = nn.ModuleList([MoE(config) for _ in range(config.n_layer)])
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.mix(x.transpose(1, 2))[..., : ids.shape[1]].transpose(1, 2)
        for layer in self.moe:
            x = x + layer(x)
        return self.head(x)
