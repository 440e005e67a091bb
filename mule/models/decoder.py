"""The decoder: one architecture, driven by one config.

Module names are those of the matching transformers class, so a state dict of ours is one of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from mule.batch import IGNORE, Batch
from mule.models.attention import Attention, visible_within
from mule.models.cache import KVCache
from mule.models.config import ModelConfig
from mule.models.loss import Kernel, nll_sum, softmax_nll_
from mule.models.mlp import SwiGLU
from mule.models.norm import RMSNorm
from mule.models.recompute import Recompute, recomputed
from mule.models.rope import rope_angles


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    In training, `dropout` drops a share of what each half adds. Source: GPT-2's resid_dropout.
    """

    dropout = 0.0
    recompute: Recompute = "none"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        visible: torch.Tensor | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            return recomputed(self.recompute, self._apply_to, x, angles, visible)
        return self._apply_to(x, angles, visible, cache)

    def _apply_to(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        visible: torch.Tensor | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        added = self.self_attn(self.input_layernorm(x), angles, visible, cache)
        x = x + F.dropout(added, self.dropout, self.training)
        added = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(added, self.dropout, self.training)


class Backbone(nn.Module):
    """Embedding, blocks and final norm: token ids (B, T) to hidden states (B, T, E)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        angles = rope_angles(positions, self.head_dim, self.rope_theta)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, angles, visible, cache)
        return self.norm(x)


class Decoder(nn.Module):
    """A causal language model. Training calls `nll_sum`, generation calls `prefill` and `decode`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._nll_kernel: Kernel = softmax_nll_

    def nll_sum(self, batch: Batch, grad_scale: float = 1.0) -> torch.Tensor:
        """Summed negative log-likelihood of the batch's targets, fp32 scalar.

        Its gradient comes times `grad_scale`.
        """
        return nll_sum(
            self._hidden(batch),
            self.lm_head.weight,
            batch.targets,
            self._nll_kernel,
            grad_scale,
            num_targets=batch.num_targets,
        )

    def nll_by_label(
        self, batch: Batch, labels: torch.Tensor, chosen: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """`nll_sum` of the targets of each label that is `chosen`; labels (B, T) int64."""
        hidden, weight = self._hidden(batch), self.lm_head.weight
        sums = {}
        for label in chosen:
            targets = batch.targets.where(labels == label, IGNORE)
            sums[label] = nll_sum(hidden, weight, targets, self._nll_kernel)
        return sums

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """The last hidden states (B, T, E)."""
        visible = visible_within(batch.segments) if batch.isolated else None
        return self.model(batch.input_ids, batch.positions, visible)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of plain causal rows; for tests and verification, not for training."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.lm_head(self.model(input_ids, positions.expand_as(input_ids), None))

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache of `capacity` tokens, in the precision and place of the weights."""
        return KVCache(self.config, batch_size, capacity, self.lm_head.weight)

    def step(self, input_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Append (B, T) tokens to the cache; logits (B, V) of the last one.

        T > 1 on an empty cache is the prefill, T = 1 a decoding step.
        """
        num_new = input_ids.shape[1]
        positions = torch.arange(cache.length, cache.length + num_new, device=input_ids.device)
        hidden = self.model(input_ids, positions.expand_as(input_ids), cache.mask(num_new), cache)
        cache.length += num_new
        return self.lm_head(hidden[:, -1])

    def set_training(self, *, dropout: float = 0.0, recompute: Recompute = "none") -> None:
        """What the blocks do in training mode only; before `compile_regions`."""
        for layer in self.model.layers:
            assert isinstance(layer, Block)
            layer.dropout, layer.recompute = dropout, recompute

    def compile_regions(self) -> None:
        """Compile the blocks (one graph serves all) and the loss kernel, in place."""
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        for module in self.modules():
            if isinstance(module, Attention):
                module.compiled = True
        self._nll_kernel = torch.compile(softmax_nll_, dynamic=True)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, 0.02); the projections that write to the residual stream by 1/sqrt(2 L) less.

        Source: Radford et al. 2019 (GPT-2), section 2.3.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            fresh = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(fresh.normal_(0.0, std, generator=generator))


def empty_decoder(config: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> Decoder:
    """A decoder with allocated, unset weights, ready to be filled by copying."""
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_embeddings:  # to_empty gives the two names separate storage
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
