"""What state-space layers keep of a text, however long it is: the last inputs of their convolution
and their state."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mule.models.config import MambaConfig


class Remembered(NamedTuple):
    """Of the rows of a batch: `inputs` (B, K - 1, C) of the convolution, oldest first, and `state`
    (B, *state_shape) fp32."""

    inputs: torch.Tensor
    state: torch.Tensor

    def keep(self, new: Remembered, where: torch.Tensor | None = None) -> None:
        """Take the values of `new` over, in place; only in the rows `where` (B,) says so."""
        for old, value in zip(self, new, strict=True):
            value = value.to(old.dtype)
            old.copy_(value if where is None else value.where(_by_row(where, old), old))

    def cleared(self, where: torch.Tensor) -> Remembered:
        """With nothing remembered in the rows `where` (B,) says so."""
        return Remembered(*(old.masked_fill(_by_row(where, old), 0) for old in self))


def _by_row(where: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return where.view(-1, *[1] * (like.dim() - 1))


def state_shape(mamba: MambaConfig) -> tuple[int, ...]:
    """A row's state: mamba2 (groups, states, channels of the group), mamba1 (channels, states)."""
    if mamba.kind == "mamba1":
        return mamba.inner_size, mamba.state_size
    return mamba.num_groups, mamba.state_size, mamba.inner_size // mamba.num_groups


def nothing(mamba: MambaConfig, lead: tuple[int, ...], like: torch.Tensor) -> Remembered:
    """What there is before a text begins, with `lead` as the first sizes."""
    inputs = (*lead, mamba.conv_kernel - 1, mamba.conv_size)
    state = like.new_zeros((*lead, *state_shape(mamba)), dtype=torch.float32)
    return Remembered(like.new_zeros(inputs), state)
