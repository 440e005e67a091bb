"""The short convolution before a state-space layer: each channel sees its own last tokens."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mule.models import native_mamba


class CausalConv(nn.Module):
    """silu(bias + sum over k of weight[k] * x[t - K + 1 + k]), channel by channel.

    A sum of shifted products, in C++ where that is there; elsewhere the compiler makes one kernel of
    it, in the layout of the projections around it. `weight` (C, 1, K) is as nn.Conv1d has it.
    """

    def __init__(self, num_channels: int, kernel_size: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(num_channels)) if bias else None

    def forward(
        self,
        x: torch.Tensor,
        segments: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(R, T, C) -> (R, T, C). `before` (R, K - 1, C) are the inputs before the first, 0 when not
        given; with `segments` (R, T) a token sees those of its own document only."""
        if before is None and native_mamba.convolves(x, self.weight):
            return native_mamba.causal_conv(x, self.weight, self.bias, segments)
        length, last = x.shape[1], self.weight.shape[-1] - 1
        rows = F.pad(x, (0, 0, last, 0)) if before is None else torch.cat((before, x), 1)
        y = x * self.weight[:, 0, last]
        for shift in range(1, last + 1):
            seen = rows[:, last - shift : last - shift + length]
            if segments is not None:
                earlier = F.pad(segments, (shift, 0), value=-1)[:, :length]
                seen = seen * (earlier == segments)[..., None]
            y = y + seen * self.weight[:, 0, last - shift]
        return F.silu(y if self.bias is None else y + self.bias)

    def kept(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The inputs (R, K - 1, C) that tokens behind `x` still see."""
        return torch.cat((before, x), 1)[:, -before.shape[1] :]
