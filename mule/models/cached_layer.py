"""What a cache keeps of one layer: all keys and values, those of a window in a ring, or a state."""

from __future__ import annotations

import torch

from mule.models.config import ModelConfig
from mule.models.recurrent import nothing

BUCKET = 64  # attention sees a multiple of this many slots, so that few shapes occur


class KeyValues:
    """Keys and values of one layer that attends, (B, H_kv, slots, head_dim)."""

    def __init__(
        self, config: ModelConfig, batch_size: int, slots: int, like: torch.Tensor
    ) -> None:
        shape = (batch_size, config.num_kv_heads, slots, config.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class StaticLayer(KeyValues):
    """A slot for every token of the text."""

    def update(
        self, length: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep (B, H_kv, T, head_dim) behind `length` tokens; the visible keys and values."""
        end = length + keys.shape[2]
        self.keys[:, :, length:end] = keys
        self.values[:, :, length:end] = values
        visible = bucketed(end, self.keys.shape[2])
        return self.keys[:, :, :visible], self.values[:, :, :visible]


class RollingLayer(KeyValues):
    """A slot for every token of a window; the token at position p lies in slot p % window."""

    def update(
        self, length: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep (B, H_kv, T, head_dim) behind `length` tokens; what the new tokens may see, as
        `rolling_mask` says."""
        window, num_new = self.keys.shape[2], keys.shape[2]
        if num_new == 1:
            slot = length % window
            self.keys[:, :, slot : slot + 1], self.values[:, :, slot : slot + 1] = keys, values
            return self.keys, self.values
        device = keys.device
        before = torch.arange(_first_seen(length, window), length, device=device) % window
        seen = [
            torch.cat((kept[:, :, before], new), dim=2) for kept, new in self._pairs(keys, values)
        ]
        last = min(num_new, window)
        slots = torch.arange(length + num_new - last, length + num_new, device=device) % window
        for kept, new in self._pairs(keys, values):
            kept[:, :, slots] = new[:, :, num_new - last :]
        return seen[0], seen[1]

    def _pairs(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return (self.keys, keys), (self.values, values)


class RecurrentLayer:
    """What one state-space layer remembers."""

    def __init__(self, config: ModelConfig, batch_size: int, like: torch.Tensor) -> None:
        assert config.mamba is not None
        self.kept = nothing(config.mamba, (batch_size,), like)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept)


def bucketed(length: int, capacity: int) -> int:
    """Slots that attention looks at when the text has `length` tokens: few different numbers."""
    return min(-(-length // BUCKET) * BUCKET, capacity)


def rolling_mask(length: int, num_new: int, window: int, device: torch.device) -> torch.Tensor:
    """(1, 1, num_new, seen) bool over what `RollingLayer.update` gives.

    One token sees the slots that are filled; several see those before them in order, then each other.
    """
    if num_new == 1:
        return (torch.arange(window, device=device) <= length)[None, None, None]
    keys = torch.arange(_first_seen(length, window), length + num_new, device=device)[None, :]
    queries = torch.arange(length, length + num_new, device=device)[:, None]
    return ((keys <= queries) & (keys > queries - window))[None, None]


def _first_seen(length: int, window: int) -> int:
    """The oldest position that the next token sees."""
    return max(0, length - window + 1)
