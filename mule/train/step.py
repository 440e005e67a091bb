"""The training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mule.batch import IGNORE, Batch
from mule.models.decoder import Decoder
from mule.train.distributed import ALONE, Group
from mule.train.optim import AdamW
from mule.train.signals import StopRequest


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
    group: Group = ALONE,
    stop: StopRequest | None = None,
) -> StepResult:
    """Update the weights once from all `micro_batches` of all processes of the group.

    The loss is the mean over every target token of the update, so the result does not depend on
    how the update was cut. One transfer from the device: loss and norm together. Among several
    processes one sum carries the gradients, the loss and the signals that `stop` noted.

    Raises NonFiniteStep if the loss or the gradient is NaN or infinite; nothing is changed then.
    """
    num_targets = sum(int((b.targets != IGNORE).sum()) for b in micro_batches)
    # Several processes know how many targets the update has only after their sum.
    divisor = num_targets if group.is_alone else 1
    loss_sum = torch.zeros((), device=micro_batches[0].targets.device)
    for i, batch in enumerate(micro_batches):
        if dropout_seeds:
            torch.manual_seed(dropout_seeds[i])
        nll = model.nll_sum(batch)  # ()
        (nll / divisor).backward()
        if len(micro_batches) > 1 or not group.is_alone:
            optimizer.accumulate()
        loss_sum += nll.detach()

    scale = 1.0  # what the gradients still lack
    if group.is_alone:
        loss, grad_norm = torch.stack((loss_sum / num_targets, optimizer.grad_norm())).tolist()
    else:
        total, num_targets, norm = _sum(optimizer, loss_sum, num_targets, group, stop)
        scale = 1 / num_targets
        loss, grad_norm = total * scale, norm * scale
    if not (loss < float("inf") and grad_norm < float("inf")):  # false for NaN too
        optimizer.zero_grad()
        raise NonFiniteStep(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}")

    optimizer.step(lr, grad_scale=min(1.0, max_grad_norm / (grad_norm + 1e-6)) * scale)
    return StepResult(loss, grad_norm, num_targets)


def _sum(
    optimizer: AdamW,
    loss_sum: torch.Tensor,
    num_targets: int,
    group: Group,
    stop: StopRequest | None,
) -> tuple[float, int, float]:
    """Sum over the processes: summed loss, number of targets, norm of the summed gradients.

    The votes of `stop` travel along, so that all learn in the same update that one must leave.
    """
    votes = stop.votes() if stop else []
    figures = torch.tensor([0.0, num_targets, *votes], device=loss_sum.device)
    figures[0] = loss_sum
    optimizer.sum_over(group, figures)
    total, count, *votes, norm = torch.cat((figures, optimizer.grad_norm()[None])).tolist()
    if stop:
        stop.agree(votes)
    return total, round(count), norm
