"""The Mamba-2 layer. Source: Dao and Gu 2024, section 7 and figure 6."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mule.models.cache import Cache
from mule.models.causal_conv import CausalConv
from mule.models.config import MambaConfig, ModelConfig
from mule.models.recurrent import Remembered
from mule.models.ssd import Inputs, ssd, ssd_step


class GatedNorm(nn.Module):
    """RMSNorm of y * silu(gate), each group of heads by itself, in fp32."""

    def __init__(self, mamba: MambaConfig, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(mamba.inner_size))
        self.eps, self.num_groups = eps, mamba.num_groups

    def forward(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        gated = (y.float() * F.silu(gate.float())).unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return self.weight * normed.to(gate.dtype)


class Mamba2(nn.Module):
    """A state-space layer of heads with one decay each; names are those of transformers' Bamba and
    GraniteMoeHybrid.

    `in_proj` gives the gate, what the convolution sees (x, B and C) and the heads' steps.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        mamba = config.mamba
        assert mamba is not None
        shared = mamba.num_groups * mamba.state_size
        self.sizes = [mamba.inner_size, mamba.conv_size, mamba.num_heads]
        self.conv_sizes = [mamba.inner_size, shared, shared]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=mamba.proj_bias)
        self.conv1d = CausalConv(mamba.conv_size, mamba.conv_kernel, bias=mamba.conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(mamba.num_heads))
        self.A_log = nn.Parameter(torch.zeros(mamba.num_heads))
        self.D = nn.Parameter(torch.ones(mamba.num_heads))
        self.norm = GatedNorm(mamba, config.norm_eps)
        self.out_proj = nn.Linear(mamba.inner_size, config.hidden_size, bias=mamba.proj_bias)
        self.head_dim, self.num_groups = mamba.head_dim, mamba.num_groups
        self.chunk_size = mamba.chunk_size
        self.layer = layer

    def forward(
        self, x: torch.Tensor, segments: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """(R, T, E) -> (R, T, E); with `segments` (R, T) nothing passes between documents."""
        gate, mixed, dt = self.in_proj(x).split(self.sizes, dim=-1)
        before = None if cache is None else cache.remembered(self.layer)
        earlier, state = (None, None) if before is None else before
        inputs = self._inputs(self.conv1d(mixed, segments, earlier), dt)
        if state is not None and x.shape[1] == 1:
            y, state = ssd_step(inputs, state)
        else:
            y, state = ssd(inputs, self.chunk_size, segments=segments, state=state)
        if cache is not None and before is not None:
            cache.remember(self.layer, Remembered(self.conv1d.kept(mixed, before.inputs), state))
        y = y + self.D.float().view(self.num_groups, -1, 1) * inputs.x
        return self.out_proj(self.norm(y.flatten(2), gate))

    def _inputs(self, convolved: torch.Tensor, dt: torch.Tensor) -> Inputs:
        x, b, c = convolved.split(self.conv_sizes, dim=-1)
        groups = (self.num_groups, -1)
        dt = F.softplus(dt.float() + self.dt_bias.float())
        a = -self.A_log.float().exp()
        return Inputs(
            x.unflatten(-1, (*groups, self.head_dim)),
            dt.unflatten(-1, groups),
            a.unflatten(-1, groups),
            b.unflatten(-1, groups),
            c.unflatten(-1, groups),
        )
