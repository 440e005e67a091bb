"""The training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mule.batch import IGNORE, Batch
from mule.models.decoder import Decoder
from mule.train.optim import AdamW


class NonFiniteStep(Exception):
    """The loss or the gradient was NaN or infinite; the weights were not touched."""


@dataclass(frozen=True)
class StepResult:
    """What one update did: mean loss in nats a target token, gradient norm before clipping."""

    loss: float
    grad_norm: float
    num_targets: int


def train_step(
    model: Decoder,
    optimizer: AdamW,
    micro_batches: Sequence[Batch],
    *,
    lr: float,
    max_grad_norm: float,
    dropout_seeds: Sequence[int] = (),
) -> StepResult:
    """Update the weights once from all `micro_batches`.

    The loss is the mean over every target token of the update, so the result does not depend on
    how the update was cut. One transfer from the device: loss and norm together.

    Raises NonFiniteStep if the loss or the gradient is NaN or infinite; nothing is changed then.
    """
    num_targets = sum(int((b.targets != IGNORE).sum()) for b in micro_batches)
    loss_sum = torch.zeros((), device=micro_batches[0].targets.device)
    for i, batch in enumerate(micro_batches):
        if dropout_seeds:
            torch.manual_seed(dropout_seeds[i])
        nll = model.nll_sum(batch)  # ()
        (nll / num_targets).backward()
        if len(micro_batches) > 1:
            optimizer.accumulate()
        loss_sum += nll.detach()

    loss, grad_norm = torch.stack((loss_sum / num_targets, optimizer.grad_norm())).tolist()
    if not (loss < float("inf") and grad_norm < float("inf")):  # false for NaN too
        optimizer.zero_grad()
        raise NonFiniteStep(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}")

    optimizer.step(lr, grad_scale=min(1.0, max_grad_norm / (grad_norm + 1e-6)))
    return StepResult(loss, grad_norm, num_targets)
