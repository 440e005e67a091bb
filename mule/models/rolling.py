"""What a layer with a sliding window keeps of a text: the tokens of its window, in a ring."""

from __future__ import annotations

import torch

from mule.models.config import ModelConfig


class RollingLayer:
    """Keys and values, (B, H_kv, window, head_dim); the token at position p lies in slot p % window."""

    def __init__(self, config: ModelConfig, batch_size: int, like: torch.Tensor) -> None:
        assert config.sliding_window is not None
        shape = (batch_size, config.num_kv_heads, config.sliding_window, config.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

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
