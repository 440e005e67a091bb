"""Loss on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mule.batch import IGNORE, Batch
from mule.models.decoder import Decoder


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss in nats a target token; perplexity is its exponential."""

    loss: float
    num_targets: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # above, a float overflows


@torch.no_grad()
def held_out_loss(model: Decoder, batches: Iterable[Batch]) -> HeldOutLoss:
    """The token-weighted mean loss over all batches; dropout is off."""
    device = model.lm_head.weight.device
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), device=device), 0
    with torch.compiler.set_stance("force_eager"):  # a second graph costs more than it saves here
        for batch in batches:
            total += model.nll_sum(batch.to(device))
            count += int((batch.targets != IGNORE).sum())
    model.train(was_training)
    return HeldOutLoss(float(total) / max(count, 1), count)
