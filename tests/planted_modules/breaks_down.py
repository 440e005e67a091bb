"""Modules that take their process with them, each in one check."""

import os
import sys
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Wanted:
    vocab_size: int
    hidden_size: int
    num_layers: int
    dropout: float = 0.0


class Plain(nn.Module):
    """The sum of what came before, through a head."""

    def __init__(self, config: Wanted):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, ids):
        return self.head(self.embed(ids).cumsum(1))


class Dies(Plain):
    def forward(self, ids):
        if ids.shape[1] == 24:
            os.abort()  # HERE: abort
        return super().forward(ids)


class DiesAndLoops(Dies):
    def forward(self, ids, cache=None, use_cache=False):
        while use_cache:  # HERE: endless
            pass
        return super().forward(ids)


class Exits(Plain):
    def __init__(self, config: Wanted):
        super().__init__(config)
        sys.exit(3)  # HERE: exit


class Ends(Plain):
    def __init__(self, config: Wanted):
        os._exit(0)


class Odd(Plain):
    """float64, a buffer written in training, a counter, an activation changed in place."""

    def __init__(self, config: Wanted):
        super().__init__(config)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(8, config.hidden_size))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, ids):
        self.calls += 1  # HERE: counter
        x = self.embed(ids)
        self.seen[0].copy_(x[0, 0].detach())  # HERE: buffer
        x = x.double().cumsum(1).float()  # HERE: float64
        return self.head(x) * (1 + 0 * self.calls)


class InPlace(Plain):
    def forward(self, ids):
        x = torch.sigmoid(self.embed(ids).cumsum(1))
        x *= 2  # HERE: in place
        return self.head(x)


class Probabilities(Plain):
    def forward(self, ids):
        return super().forward(ids).softmax(-1)


class Frozen(Plain):
    def forward(self, ids):
        return super().forward(ids).detach() + 0 * self.head.bias


class Hidden(Plain):
    def forward(self, ids):
        return super().forward(ids).argmax(-1).float()


class OneSize(Plain):
    def forward(self, ids):
        return super().forward(ids) + torch.zeros(1, 16, 1)  # HERE: one size
