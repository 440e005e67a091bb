"""The Mamba layer, with Jamba's norms where the config has them. Source: Gu and Dao 2023, section 3.4;
Lieber et al. 2024 (Jamba), section 6.4."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mule.models.cache import Cache
from mule.models.causal_conv import CausalConv
from mule.models.config import ModelConfig
from mule.models.norm import RMSNorm
from mule.models.recurrent import Remembered
from mule.models.selective_scan import selective_scan


class Mamba1(nn.Module):
    """A state-space layer whose channels have a decay for each state; names are those of
    transformers' Jamba.

    `in_proj` gives x and the gate; `x_proj` of x the steps' bottleneck, B and C.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        mamba = config.mamba
        assert mamba is not None
        hidden, inner, states = config.hidden_size, mamba.inner_size, mamba.state_size
        self.sizes = [mamba.dt_rank, states, states]
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=mamba.proj_bias)
        self.conv1d = CausalConv(inner, mamba.conv_kernel, bias=mamba.conv_bias)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(mamba.dt_rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner, states))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden, bias=mamba.proj_bias)
        self.inner_norms = mamba.inner_norms
        if mamba.inner_norms:
            self.dt_layernorm = RMSNorm(mamba.dt_rank, config.norm_eps)
            self.b_layernorm = RMSNorm(states, config.norm_eps)
            self.c_layernorm = RMSNorm(states, config.norm_eps)
        self.layer = layer
        self.compiled = False  # whether the scan, which the compiler does not see, is compiled too

    def forward(
        self, x: torch.Tensor, segments: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """(R, T, E) -> (R, T, E); with `segments` (R, T) nothing passes between documents."""
        mixed, gate = self.in_proj(x).chunk(2, dim=-1)
        before = None if cache is None else cache.remembered(self.layer)
        x = self.conv1d(mixed, segments, before and before.inputs)
        dt, b, c = self.x_proj(x).split(self.sizes, dim=-1)
        if self.inner_norms:
            dt, b, c = self.dt_layernorm(dt), self.b_layernorm(b), self.c_layernorm(c)
        step = F.softplus(self.dt_proj(dt).float())
        a = -self.A_log.float().exp()
        state = a.new_zeros(len(x), *a.shape) if before is None else before.state
        inputs = [step, step * x.float(), a, b.float(), c.float()]
        y, _, last = selective_scan(inputs, _begins(x, segments), state, self.compiled)
        if cache is not None and before is not None:
            cache.remember(self.layer, Remembered(self.conv1d.kept(mixed, before.inputs), last))
        y = (y + self.D.float() * x) * F.silu(gate.float())
        return self.out_proj(y.to(x.dtype))


def _begins(x: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Whether a document begins at each token (R, T), apart from the row's first."""
    begins = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    if segments is not None:
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return begins
