"""The decoder: one architecture, driven by one config.

Module names are those of the matching transformers class, so a state dict of ours is one of theirs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from mule.batch import IGNORE, Batch
from mule.models.attention import Attention, visible_within, within_window
from mule.models.balance import Balance
from mule.models.block import Block, new_block, new_norm
from mule.models.cache import Cache, KVCache, SlotRows
from mule.models.config import ModelConfig, Routing
from mule.models.loss import (
    Kernel,
    compiled_softmax_nll_,
    nll_of_targets,
    nll_sum,
    softmax_nll_by_rows_,
)
from mule.models.mamba import first_values
from mule.models.mamba1 import Mamba1
from mule.models.moe import MoE, RoutingPass
from mule.models.recompute import Recompute
from mule.models.rope import Angles, changes_at, local_angles, model_angles
from mule.models.vector_math import settle_vector_math

# Projections that write to the residual stream.
_TO_RESIDUAL = ("o_proj.weight", "down_proj.weight", "experts.down_proj", "out_proj.weight")


class Backbone(nn.Module):
    """Embedding, blocks and final norm: token ids (B, T) to hidden states (B, T, E)."""

    num_frozen = 0  # of the first blocks: nothing is trained in them, or below

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Unset, as `init_weights` or a folder sets it: to draw it on the meta device, nn.Embedding
        # would import the compiler, which takes seconds.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(new_block(config, i) for i in range(config.num_layers))
        self.norm = new_norm(config)
        self.config = config

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        segments: torch.Tensor | None = None,
        cache: Cache | None = None,
        *,
        entering: torch.Tensor | None = None,
        routing: RoutingPass | None = None,
    ) -> torch.Tensor:
        """With `segments` (B, T) nothing passes from one document of a row to another.

        With `entering`, what `trunk` gives for these tokens, only the blocks above are computed. With
        `routing` the mixtures route as in training, and what they did is kept there."""
        layers = list(self.layers)
        if entering is None:
            entering = self.embed(input_ids)
        else:
            layers = layers[self.num_frozen :]
        x = self.norm(self._through(layers, entering, positions, segments, cache, routing))
        # Scaled here, the logits are: the head is linear.
        return x if self.config.logit_scale == 1.0 else x * self.config.logit_scale

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What enters the first block (B, T, E); the scale is rounded to the weights' precision."""
        x = self.embed_tokens(input_ids)
        scale = self.config.embedding_scale
        return x if scale == 1.0 else x * x.new_full((), scale)

    @torch.no_grad()
    def trunk(
        self, input_ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor | None
    ) -> torch.Tensor:
        """What enters the first block that is not frozen (B, T, E), without a gradient."""
        layers = list(self.layers)[: self.num_frozen]
        return self._through(layers, self.embed(input_ids), positions, segments)

    def _through(
        self,
        layers: Sequence[nn.Module],
        x: torch.Tensor,
        positions: torch.Tensor,
        segments: torch.Tensor | None,
        cache: Cache | None = None,
        routing: RoutingPass | None = None,
    ) -> torch.Tensor:
        counted = None if routing is None else routing.counted
        blocks = [layer for layer in layers if isinstance(layer, Block)]
        kinds = {block.kind for block in blocks}
        angles = {rope: self._angles(rope, positions, cache) for rope in {k.rope for k in kinds}}
        windows = {kind.window for kind in kinds if kind.mixer != "mamba"}
        masks = _masks(windows, positions, cache, x, segments, self.config.head_dim)
        for block in blocks:
            kind = block.kind
            seen = segments if kind.mixer == "mamba" else masks[kind.window]
            passed = block(x, angles[kind.rope], seen, cache, counted)
            x = passed[0] if isinstance(passed, tuple) else passed
            if routing is not None and isinstance(passed, tuple):
                routing.routed[block.number] = passed[1]
        return x

    def _angles(self, rope: str, positions: torch.Tensor, cache: Cache | None) -> Angles | None:
        if rope == "none":
            return None
        if rope == "local":
            return local_angles(positions, self.config)
        length = None if cache is None else cache.text_tokens(positions.shape[1])
        return model_angles(positions, self.config, cached_length=length)


class Decoder(nn.Module):
    """A causal language model. Training calls `nll_sum`, generation calls `prefill` and `decode`."""

    balance: Balance | None = None  # of the experts, in training

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settle_vector_math()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._softmax_nll: Callable[..., torch.Tensor] = softmax_nll_by_rows_

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return self.lm_head.weight.device

    def _kernel(self, softmax_nll: Callable[..., torch.Tensor]) -> Kernel:
        cap = self.config.logit_softcap
        return functools.partial(softmax_nll, softcap=cap) if cap else softmax_nll

    def nll_sum(self, batch: Batch, grad_scale: float = 1.0) -> torch.Tensor:
        """Summed negative log-likelihood of the batch's targets, fp32 scalar.

        Its gradient comes times `grad_scale`. With it comes that of the routers' losses, which are no
        part of the value.
        """
        routing = None
        if self.balance is not None and self.training and torch.is_grad_enabled():
            routing = RoutingPass(batch.segments != 0)
        nll = nll_sum(
            self._hidden(batch, routing),
            self.lm_head.weight,
            batch.targets,
            self._kernel(self._softmax_nll),
            grad_scale,
            num_targets=batch.num_targets,
        )
        if self.balance is None or routing is None:
            return nll
        losses = self.balance.add(routing.routed) * grad_scale
        return nll + (losses - losses.detach())

    def nll_by_label(
        self, batch: Batch, labels: torch.Tensor, chosen: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """`nll_sum` of the targets of each label that is `chosen`; labels (B, T) int64."""
        hidden, weight = self._hidden(batch), self.lm_head.weight
        sums = {}
        for label in chosen:
            targets = batch.targets.where(labels == label, IGNORE)
            sums[label] = nll_sum(hidden, weight, targets, self._kernel(softmax_nll_by_rows_))
        return sums

    def nll_of_targets(self, batch: Batch) -> torch.Tensor:
        """-log p of each target, fp32 (N,), in the order of the rows; for evaluation."""
        cap = self.config.logit_softcap
        return nll_of_targets(self._hidden(batch), self.lm_head.weight, batch.targets, cap)

    def _hidden(self, batch: Batch, routing: RoutingPass | None = None) -> torch.Tensor:
        """The last hidden states (B, T, E)."""
        entering = None
        if batch.entering is not None:
            entering = batch.entering()
        elif self.model.num_frozen:
            entering = self.entering(batch)
        return self.model(
            batch.input_ids, batch.positions, _segments(batch), entering=entering, routing=routing
        )

    def entering(self, batch: Batch) -> torch.Tensor:
        """What enters the first block that is not frozen (B, T, E).

        Row by row: the bits of a row do not depend on its neighbours, so that they may be kept.
        """
        rows = (batch.rows(slice(i, i + 1)) for i in range(len(batch.input_ids)))
        return torch.cat([self.model.trunk(r.input_ids, r.positions, _segments(r)) for r in rows])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of plain causal rows; for tests and verification, not for training."""
        return self._logits(self._plain_rows(input_ids))

    def logits_at(self, input_ids: torch.Tensor, place: int) -> torch.Tensor:
        """Logits (B, V) behind one token of plain causal rows; what comes after it changes nothing."""
        return self._logits(self._plain_rows(input_ids)[:, place])

    def _plain_rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.model(input_ids, positions.expand_as(input_ids))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits, cap = self.lm_head(hidden), self.config.logit_softcap
        return logits if cap is None else (logits / cap).tanh() * cap

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache of `capacity` tokens, in the precision and place of the weights."""
        return KVCache(self.config, batch_size, capacity, self.lm_head.weight)

    def step(self, input_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Append (B, T) tokens to the cache; logits (B, V) of the last one.

        T > 1 on an empty cache is the prefill, T = 1 a decoding step.
        """
        limit = changes_at(self.config)
        if limit is not None:
            if 0 < cache.length <= limit < cache.length + input_ids.shape[1]:
                input_ids = cache.rewound(input_ids)  # the keys so far turned by other angles
            cache.append(input_ids)
        num_new = input_ids.shape[1]
        positions = torch.arange(cache.length, cache.length + num_new, device=input_ids.device)
        hidden = self.model(input_ids, positions.expand_as(input_ids), cache=cache)
        cache.length += num_new
        return self._logits(hidden[:, -1])

    def extend(self, input_ids: torch.Tensor, rows: SlotRows) -> torch.Tensor:
        """Append (B, T) tokens to slots of a cache; logits (B, V) of the last ones.

        A text that outgrows `changes_at` is the caller's to begin again.
        """
        return self._logits(self.model(input_ids, rows.positions, cache=rows)[:, -1])

    def set_training(
        self,
        *,
        dropout: float = 0.0,
        recompute: Recompute = "none",
        routing: Routing | None = None,
    ) -> None:
        """What the blocks do in training mode only; before `compile_regions`.

        Without `routing` a mixture's routers are neither balanced nor watched.
        """
        mixtures: dict[int, MoE] = {}
        for layer in self.model.layers:
            assert isinstance(layer, Block)
            layer.dropout, layer.recompute = dropout, recompute
            if isinstance(layer.mlp, MoE):
                mixtures[layer.number] = layer.mlp
        self.balance = Balance(mixtures, routing) if mixtures and routing else None

    def kept_buffers(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has beside weights, by name, and passes may change: here nothing."""
        return {}

    def compile_regions(self) -> None:
        """Compile the blocks (one graph serves all) and the loss kernel, in place."""
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        for module in self.modules():
            if isinstance(module, Attention | Mamba1):
                module.compiled = True
        self._softmax_nll = compiled_softmax_nll_()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, 0.02); the projections that write to the residual stream by 1/sqrt(2 L) less.

        Biases are 0, and norms multiply by 1.

        Source: Radford et al. 2019 (GPT-2), section 2.3.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            own = first_values(self.config, name, parameter, generator)
            if own is not None:
                parameter.copy_(own)
                continue
            if parameter.dim() == 1:
                is_one = not (name.endswith(".bias") or self.config.norm_plus_one)
                parameter.fill_(1.0 if is_one else 0.0)
                continue
            std = residual_std if name.endswith(_TO_RESIDUAL) else 0.02
            fresh = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(fresh.normal_(0.0, std, generator=generator))


def _masks(
    windows: set[int | None],
    positions: torch.Tensor,
    cache: Cache | None,
    x: torch.Tensor,
    segments: torch.Tensor | None,
    head_dim: int,
) -> dict[int | None, torch.Tensor | None]:
    """What tokens see in blocks that attend, by the window that they have."""
    if cache is not None:
        return {window: cache.mask(positions.shape[1], window) for window in windows}
    visible = visible_within(segments, x, head_dim) if windows else None
    return {
        window: visible if window is None else within_window(visible, positions, window)
        for window in windows
    }


def _segments(batch: Batch) -> torch.Tensor | None:
    """Its documents, where nothing passes from one to another."""
    return batch.segments if batch.isolated else None


def empty_decoder(config: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> Decoder:
    """A decoder with allocated, unset weights, ready to be filled by copying."""
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_embeddings:  # to_empty gives the two names separate storage
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
