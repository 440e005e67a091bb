"""The batch: the one contract between data, models and training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE = -100  # a target that is not trained (the field's convention, torch's default ignore_index)


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, all (B, T) int64.

    `targets` is already shifted: targets[b, t] follows input_ids[b, t], or is IGNORE.
    `segments` numbers the documents of a row from 1; 0 is padding. `positions` restart at each.
    `isolated` says that attention must not cross segments; without it rows are plain causal.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    isolated: bool

    def to(self, device: torch.device) -> Batch:
        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True),
            isolated=self.isolated,
        )
