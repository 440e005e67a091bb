"""The batch: the one contract between data, models and training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

IGNORE = -100  # a target that is not trained (the field's convention, torch's default ignore_index)


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, all (B, T) int64.

    `targets` is already shifted: targets[b, t] follows input_ids[b, t], or is IGNORE.
    `segments` numbers the documents of a row from 1; 0 is padding. `positions` restart at each.
    `isolated` says that attention must not cross segments; without it rows are plain causal.
    `entering` gives what enters the first block that is not frozen (B, T, E), where that is kept.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    isolated: bool
    entering: Callable[[], torch.Tensor] | None = None

    @cached_property
    def num_targets(self) -> int:
        """How many tokens are trained; asked before `to`, since a device must be waited for."""
        return int((self.targets != IGNORE).sum())

    @cached_property
    def num_tokens(self) -> int:
        """How many tokens are not padding; asked before `to` too."""
        return int((self.segments != 0).sum())

    def rows(self, chosen: slice) -> Batch:
        """Some of the rows, without what is kept of them."""
        return Batch(
            self.input_ids[chosen],
            self.targets[chosen],
            self.positions[chosen],
            self.segments[chosen],
            self.isolated,
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on another device, with its targets and tokens counted here."""
        names = ("input_ids", "targets", "positions", "segments")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        batch = replace(self, **moved)
        batch.__dict__.update(num_targets=self.num_targets, num_tokens=self.num_tokens)
        return batch
