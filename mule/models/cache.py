"""Static key/value caches: allocated once, written in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mule.errors import ModelError
from mule.models.config import ModelConfig

_BUCKET = 64  # attention sees a multiple of this many slots, so that few shapes occur


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


class KVCache:
    """Keys and values of every layer, (L, B, H_kv, capacity, head_dim); `length` tokens are filled."""

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, like: torch.Tensor
    ) -> None:
        if capacity > config.max_position_embeddings:
            raise ModelError(
                f"a cache of {capacity} tokens exceeds the model's {config.max_position_embeddings}",
                f"ask for at most {config.max_position_embeddings} tokens, prompt included",
            )
        self.capacity = -(-capacity // _BUCKET) * _BUCKET
        shape = (config.num_layers, batch_size, config.num_kv_heads, self.capacity, config.head_dim)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.ids = like.new_zeros((batch_size, self.capacity), dtype=torch.int64)
        self.length = 0

    def visible(self, num_new: int) -> int:
        """Slots that attention looks at when `num_new` tokens are appended: a bucketed length."""
        return min(-(-(self.length + num_new) // _BUCKET) * _BUCKET, self.capacity)

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, H_kv, T, head_dim) at the end; the visible keys and values of this layer."""
        end = self.length + keys.shape[2]
        visible = self.visible(keys.shape[2])
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :visible], self.values[layer, :, :, :visible]

    def mask(self, num_new: int, window: int | None = None) -> torch.Tensor:
        """(1, 1, num_new, visible) bool: each new token sees itself and what came before.

        With a `window`, only that many tokens.
        """
        slots = torch.arange(self.visible(num_new), device=self.keys.device)[None, :]
        queries = torch.arange(self.length, self.length + num_new, device=self.keys.device)[:, None]
        seen = slots <= queries
        if window is not None:
            seen &= slots > queries - window
        return seen[None, None]

    def text_tokens(self, num_new: int) -> int:
        """How long the text is with `num_new` more tokens."""
        return self.length + num_new

    def append(self, ids: torch.Tensor) -> None:
        """Keep the tokens (B, T) that are being added, for a model that may have to start over."""
        self.ids[:, self.length : self.length + ids.shape[1]] = ids

    def rewound(self, ids: torch.Tensor) -> torch.Tensor:
        """Empty the cache; all its tokens so far, and `ids` (B, T) behind them."""
        all_ids = torch.cat((self.ids[:, : self.length], ids), dim=1)
        self.length = 0
        return all_ids


class SlotCache:
    """Keys and values of many conversations, (L, slots, H_kv, capacity, head_dim).

    Each slot fills at its own pace. On a processor, memory is taken as it is first written.
    """

    def __init__(
        self, config: ModelConfig, num_slots: int, context_tokens: int, like: torch.Tensor
    ) -> None:
        self.scratch = context_tokens  # where rows that count for nothing write
        capacity = -(-(context_tokens + 1) // _BUCKET) * _BUCKET
        shape = (config.num_layers, num_slots, config.num_kv_heads, capacity, config.head_dim)
        self.keys, self.values = _lazy_zeros(shape, like), _lazy_zeros(shape, like)

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
        visible = min(-(-longest // _BUCKET) * _BUCKET, self.keys.shape[3])
        return SlotRows(
            self,
            slots,
            begin + torch.arange(num_new, device=device),
            torch.tensor(text_tokens, device=device),
            visible,
        )

    def copy(self, source: int, destination: int, num_tokens: int) -> None:
        """Give a slot the first tokens of another."""
        for cached in (self.keys, self.values):
            cached[:, destination, :, :num_tokens] = cached[:, source, :, :num_tokens]

    def clear(self, slot: int) -> None:
        """Zeros everywhere: what is masked must still be a number."""
        self.keys[:, slot] = 0
        self.values[:, slot] = 0


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
            part = cached[layer, self.slots]
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


def _lazy_zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros; on a processor in pages that take no memory before they are written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    num_bytes = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(like.dtype).view(shape)
