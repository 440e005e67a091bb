"""Caches, allocated once, written in place: keys and values of all tokens for the layers that attend,
of the last ones for those with a sliding window, a state for the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mule.errors import ModelError
from mule.models.cached_layer import (
    BUCKET,
    RecurrentLayer,
    RollingLayer,
    StaticLayer,
    bucketed,
    rolling_mask,
)
from mule.models.config import ModelConfig
from mule.models.recurrent import Remembered, nothing


class Cache(Protocol):
    """What the decoder asks of a cache while it appends tokens."""

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a layer's new keys and values; all that the new tokens may see."""
        ...

    def mask(self, num_new: int, window: int | None = None) -> torch.Tensor:
        """What each new token sees of those."""
        ...

    def text_tokens(self, num_new: int) -> int | torch.Tensor:
        """How long the text is with the new tokens; (B,) where rows differ."""
        ...

    def remembered(self, layer: int) -> Remembered:
        """What a state-space layer kept of the text so far."""
        ...

    def remember(self, layer: int, new: Remembered) -> None:
        """Keep what it goes on from behind the new tokens."""
        ...


class KVCache:
    """What every layer keeps of some texts of equal length; `length` tokens are filled."""

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, like: torch.Tensor
    ) -> None:
        if capacity > config.max_position_embeddings:
            raise ModelError(
                f"a cache of {capacity} tokens exceeds the model's {config.max_position_embeddings}",
                f"ask for at most {config.max_position_embeddings} tokens, prompt included",
            )
        self.capacity = -(-capacity // BUCKET) * BUCKET
        self.layers: list[StaticLayer | RollingLayer | RecurrentLayer] = [
            self._new_layer(config, layer, batch_size, like) for layer in range(config.num_layers)
        ]
        self.ids = like.new_zeros((batch_size, self.capacity), dtype=torch.int64)
        self.length = 0

    def _new_layer(
        self, config: ModelConfig, layer: int, batch_size: int, like: torch.Tensor
    ) -> StaticLayer | RollingLayer | RecurrentLayer:
        if config.has_mamba(layer):
            return RecurrentLayer(config, batch_size, like)
        window = config.sliding_window if layer in config.sliding_layers else None
        if window is not None and self._rolls(window):
            return RollingLayer(config, batch_size, window, like)
        return StaticLayer(config, batch_size, self.capacity, like)

    def _rolls(self, window: int) -> bool:
        """Whether a layer that sees so many tokens keeps no more than those."""
        return window < self.capacity

    def visible(self, num_new: int) -> int:
        """Slots that attention looks at when `num_new` tokens are appended: a bucketed length."""
        return bucketed(self.length + num_new, self.capacity)

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, H_kv, T, head_dim) at the end; the visible keys and values of this layer."""
        kept = self.layers[layer]
        assert not isinstance(kept, RecurrentLayer)
        return kept.update(self.length, keys, values)

    def remembered(self, layer: int) -> Remembered:
        """What a state-space layer kept of the text so far."""
        kept = self.layers[layer]
        assert isinstance(kept, RecurrentLayer)
        return kept.kept

    def remember(self, layer: int, new: Remembered) -> None:
        """Keep what it goes on from behind the new tokens."""
        self.remembered(layer).keep(new)

    def mask(self, num_new: int, window: int | None = None) -> torch.Tensor:
        """(1, 1, num_new, visible) bool: each new token sees itself and what came before.

        With a `window`, only that many tokens.
        """
        if window is not None and self._rolls(window):
            return rolling_mask(self.length, num_new, window, self.ids.device)
        slots = torch.arange(self.visible(num_new), device=self.ids.device)[None, :]
        queries = torch.arange(self.length, self.length + num_new, device=self.ids.device)[:, None]
        seen = slots <= queries
        if window is not None:
            seen &= slots > queries - window
        return seen[None, None]

    def text_tokens(self, num_new: int) -> int:
        """How long the text is with `num_new` more tokens."""
        return self.length + num_new

    @property
    def num_bytes(self) -> int:
        """Of all that is kept for the layers."""
        return sum(layer.num_bytes for layer in self.layers)

    def append(self, ids: torch.Tensor) -> None:
        """Keep the tokens (B, T) that are being added, for a model that may have to start over."""
        self.ids[:, self.length : self.length + ids.shape[1]] = ids

    def rewound(self, ids: torch.Tensor) -> torch.Tensor:
        """Empty the cache; all its tokens so far, and `ids` (B, T) behind them."""
        all_ids = torch.cat((self.ids[:, : self.length], ids), dim=1)
        self.length = 0
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                layer.kept.inputs.zero_()
                layer.kept.state.zero_()
        return all_ids


class SlotCache:
    """Keys and values of many conversations, (A, slots, H_kv, capacity, head_dim) for the A layers
    that attend, and what the other layers remember.

    Each slot fills at its own pace. On a processor, memory is taken as it is first written.
    """

    def __init__(
        self, config: ModelConfig, num_slots: int, context_tokens: int, like: torch.Tensor
    ) -> None:
        self.scratch = context_tokens  # where rows that count for nothing write
        capacity = -(-(context_tokens + 1) // BUCKET) * BUCKET
        attending, others = config.attention_layers, config.mamba_layers
        self.places = {layer: i for kind in (attending, others) for i, layer in enumerate(kind)}
        shape = (len(attending), num_slots, config.num_kv_heads, capacity, config.head_dim)
        self.keys, self.values = _lazy_zeros(shape, like), _lazy_zeros(shape, like)
        self.kept: Remembered | None = None
        if config.mamba is not None and others:
            self.kept = nothing(config.mamba, (len(others), num_slots), like)

    def rows(
        self,
        slots: slice,
        starts: Sequence[int],
        num_new: int,
        text_tokens: Sequence[int],
        longest: int,
    ) -> SlotRows:
        """Neighbouring slots, as the decoder appends `num_new` tokens to each from `starts` on.

        `text_tokens`: the length of each one's text; `longest`: the most tokens that any sees.
        """
        device = self.keys.device
        begin = torch.tensor(starts, device=device)[:, None]
        return SlotRows(
            self,
            slots,
            begin + torch.arange(num_new, device=device),
            torch.tensor(text_tokens, device=device),
            bucketed(longest, self.keys.shape[3]),
        )

    @property
    def num_bytes(self) -> int:
        """Of keys, values and states, whether written or not."""
        states = sum(tensor.nbytes for tensor in self.kept or ())
        return self.keys.nbytes + self.values.nbytes + states

    def copy(self, source: int, destination: int, num_tokens: int) -> None:
        """Give a slot the first tokens of another; where layers are recurrent, all of its tokens."""
        for cached in (self.keys, self.values):
            cached[:, destination, :, :num_tokens] = cached[:, source, :, :num_tokens]
        for state in self.kept or ():
            state[:, destination] = state[:, source]

    def clear(self, slot: int) -> None:
        """Zeros everywhere: what is masked must still be a number."""
        for tensor in (self.keys, self.values, *(self.kept or ())):
            tensor[:, slot] = 0


@dataclass
class SlotRows:
    """Some slots of a SlotCache during one forward pass; positions (B, T), texts (B,)."""

    cache: SlotCache
    slots: slice
    positions: torch.Tensor
    texts: torch.Tensor
    visible: int

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, H_kv, T, head_dim) at the rows' ends; the visible keys and values."""
        found = []
        rows = torch.arange(len(self.positions), device=keys.device)[:, None]
        for cached, new in ((self.cache.keys, keys), (self.cache.values, values)):
            part = cached[self.cache.places[layer], self.slots]
            part[rows, :, self.positions] = new.transpose(1, 2)
            found.append(part[:, :, : self.visible])
        return found[0], found[1]

    def mask(self, num_new: int, window: int | None = None) -> torch.Tensor:
        """(B, 1, num_new, visible) bool: each new token sees itself and what came before."""
        places = torch.arange(self.visible, device=self.positions.device)
        queries = self.positions[:, :, None]
        seen = places <= queries
        if window is not None:
            seen &= places > queries - window
        return seen[:, None]

    def text_tokens(self, num_new: int) -> torch.Tensor:
        """The length of each row's text (B,)."""
        return self.texts

    def remembered(self, layer: int) -> Remembered:
        """What a state-space layer kept of the rows' texts so far: nothing where one begins."""
        return self._kept(layer).cleared(self.positions[:, 0] == 0)

    def remember(self, layer: int, new: Remembered) -> None:
        """Keep what it goes on from; rows that count for nothing leave their slots as they are."""
        self._kept(layer).keep(new, self.positions[:, 0] != self.cache.scratch)

    def _kept(self, layer: int) -> Remembered:
        kept, place = self.cache.kept, self.cache.places[layer]
        assert kept is not None
        return Remembered(kept.inputs[place, self.slots], kept.state[place, self.slots])


def _lazy_zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros; on a processor in pages that take no memory before they are written."""
    if like.device.type != "cpu" or 0 in shape:
        return like.new_zeros(shape)
    num_bytes = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(like.dtype).view(shape)
