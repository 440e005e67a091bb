"""The block of a decoder: a mixer, which is attention or a state-space layer, and
an MLP or a mixture of experts."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mule.models.attention import Attention
from mule.models.cache import Cache
from mule.models.config import ModelConfig
from mule.models.mamba import new_mamba
from mule.models.mlp import GatedMLP
from mule.models.moe import MoE, Routed
from mule.models.norm import RMSNorm
from mule.models.recompute import Recompute, recomputed
from mule.models.rope import Angles


class Kind(NamedTuple):
    """What tells a block's positions and attention from another's."""

    rope: Literal["full", "local", "none"]
    window: int | None
    mixer: Literal["attention", "mamba"] = "attention"


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is attention or a state-space layer,
    the MLP one or a mixture of them.

    With sandwich norms what each half adds passes a norm too, and `post_attention_layernorm` is that
    of attention, as Gemma names them; with a residual scale it is multiplied by that.
    In training, `dropout` drops a share of what each half adds. Source: GPT-2's resid_dropout.
    """

    dropout = 0.0
    recompute: Recompute = "none"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = new_norm(config)
        if config.has_mamba(layer):
            self.mamba = new_mamba(config, layer)
        else:
            self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = new_norm(config)
        if config.sandwich_norms:
            self.pre_feedforward_layernorm = new_norm(config)
            self.post_feedforward_layernorm = new_norm(config)
        self.mlp = MoE(config) if config.has_experts(layer) else GatedMLP(config)
        self.sandwich, self.residual_scale = config.sandwich_norms, config.residual_scale
        self.kind, self.number = _kind(config, layer), layer

    def forward(
        self,
        x: torch.Tensor,
        angles: Angles | None,
        visible: torch.Tensor | None,
        cache: Cache | None = None,
        counted: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Routed]:
        """With `counted` (B, T) bool, a mixture routes as in training, and says what it did."""
        if self.training and torch.is_grad_enabled():
            return recomputed(self.recompute, self._apply_to, x, angles, visible, None, counted)
        return self._apply_to(x, angles, visible, cache, counted)

    def _apply_to(
        self,
        x: torch.Tensor,
        angles: Angles | None,
        visible: torch.Tensor | None,
        cache: Cache | None = None,
        counted: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Routed]:
        x_normed = self.input_layernorm(x)
        if self.kind.mixer == "mamba":
            added = self.mamba(x_normed, visible, cache)
        else:
            added = self.self_attn(x_normed, angles, visible, cache)
        if self.sandwich:
            x = self._plus(x, self.post_attention_layernorm(added))
            added = self.mlp(self.pre_feedforward_layernorm(x))
            return self._plus(x, self.post_feedforward_layernorm(added))
        x = self._plus(x, added)
        x_normed = self.post_attention_layernorm(x)
        if counted is not None and isinstance(self.mlp, MoE):
            added, routed = self.mlp.train_forward(x_normed, counted)
            return self._plus(x, added), routed
        return self._plus(x, self.mlp(x_normed))

    def _plus(self, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        if self.residual_scale != 1.0:
            added = added * self.residual_scale
        return x + F.dropout(added, self.dropout, self.training)


class MambaBlock(Block):
    """A block with a state-space layer.

    Its own code object, so that a model with blocks of both kinds has one graph of each, and none is
    compiled again."""

    def forward(
        self,
        x: torch.Tensor,
        angles: Angles | None,
        visible: torch.Tensor | None,
        cache: Cache | None = None,
        counted: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Routed]:
        return super().forward(x, angles, visible, cache, counted)


def new_block(config: ModelConfig, layer: int) -> Block:
    """Block number `layer`."""
    return MambaBlock(config, layer) if config.has_mamba(layer) else Block(config, layer)


def new_norm(config: ModelConfig) -> RMSNorm:
    """The norm before each half of a block, and behind the last."""
    return RMSNorm(config.hidden_size, config.norm_eps, plus_one=config.norm_plus_one)


def _kind(config: ModelConfig, layer: int) -> Kind:
    if config.has_mamba(layer):
        return Kind("none", None, "mamba")
    window = config.sliding_window if layer in config.sliding_layers else None
    if layer in config.nope_layers:
        return Kind("none", window)
    is_local = window is not None and config.rope_local_theta is not None
    return Kind("local" if is_local else "full", window)
