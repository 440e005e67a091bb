"""The gated feed-forward layer. Source: Shazeer 2020, equation 6 (SwiGLU, GEGLU)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mule.models.config import ModelConfig


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU with silu, GEGLU with gelu's tanh form.

    `gate_up_proj` is gate above up, in one matrix.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.fused, self.activation = config.fused_mlp, config.activation
        if self.fused:
            self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        else:
            self.gate_proj = nn.Linear(hidden, inner, bias=bias)
            self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation == "silu":
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)
