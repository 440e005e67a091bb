"""The training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mule.batch import Batch
from mule.machine import keep_freed_memory
from mule.models.decoder import Decoder
from mule.train.distributed import ALONE, Group
from mule.train.optim import Optimizer
from mule.train.scaler import LossScaler
from mule.train.signals import StopRequest

# From the loss and the gradient norm of an update: why it must not be applied, or None.
Refuse = Callable[[float, float], str | None]


class RefusedStep(Exception):
    """The update was not applied; weights, moments and gradients are as if it had not been."""


class NonFiniteStep(RefusedStep):
    """The loss or the gradient was NaN or infinite."""


class Overflow(RefusedStep):
    """The scaled gradient went beyond fp16; the loss scale has been halved."""


@dataclass(frozen=True)
class StepResult:
    """What one update did: mean loss in nats a target token, gradient norm before clipping."""

    loss: float
    grad_norm: float
    num_targets: int


def train_step(
    model: Decoder,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    *,
    lr: float,
    max_grad_norm: float,
    dropout_seeds: Sequence[int] = (),
    group: Group = ALONE,
    stop: StopRequest | None = None,
    scaler: LossScaler | None = None,
    refuse: Refuse = lambda loss, grad_norm: None,
) -> StepResult:
    """Update the weights once from all `micro_batches` of all processes of the group.

    The loss is the mean over every target token of the update, so the result does not depend on
    how the update was cut. One transfer from the device: loss and norm together. Among several
    processes one sum carries the gradients, the loss and the signals that `stop` noted.

    Raises RefusedStep, with nothing changed: NonFiniteStep if the loss or the gradient is NaN or
    infinite, Overflow if that is due to the scale of `scaler`, else what `refuse` says.
    """
    num_targets = sum(batch.num_targets for batch in micro_batches)
    if model.balance is not None:
        model.balance.begin(_targets_per_token(micro_batches, group))
    # fp16 is scaled where the gradient begins; other formats are divided by the number of targets,
    # which several processes know only after their sum.
    factor = scaler.factor if scaler else 1.0
    divisor = num_targets if group.is_alone and not scaler else 1
    loss_sum = torch.zeros((), device=micro_batches[0].targets.device)
    for i, batch in enumerate(micro_batches):
        if dropout_seeds:
            torch.manual_seed(dropout_seeds[i])
        nll = model.nll_sum(batch, grad_scale=factor)  # ()
        (nll / divisor).backward()
        if len(micro_batches) > 1 or not group.is_alone:
            optimizer.accumulate()
        loss_sum += nll.detach()

    if group.is_alone:
        loss, grad_norm = torch.stack((loss_sum / num_targets, optimizer.grad_norm())).tolist()
    else:
        loss, num_targets, grad_norm = _sum(optimizer, loss_sum, num_targets, group, stop)
    scale = divisor / (factor * num_targets)  # what the gradients still lack
    grad_norm *= scale
    if refusal := _refusal(loss, grad_norm, scaler, refuse):
        optimizer.zero_grad()
        raise refusal

    optimizer.step(lr, grad_scale=min(1.0, max_grad_norm / (grad_norm + 1e-6)) * scale)
    if scaler:
        scaler.applied()
    if model.balance is not None:
        model.balance.applied(group.sum_)
    if not group.is_alone:
        for buffer in model.kept_buffers().values():
            group.copy_of_first_(buffer)
    keep_freed_memory()  # once, from here on: what compiling and setting up took is given back
    return StepResult(loss, grad_norm, num_targets)


def _targets_per_token(micro_batches: Sequence[Batch], group: Group) -> float:
    """Of the update, all processes together: the routers' losses are means over its tokens."""
    counts = [sum(b.num_targets for b in micro_batches), sum(b.num_tokens for b in micro_batches)]
    if not group.is_alone:
        sums = torch.tensor(counts, device=micro_batches[0].targets.device)
        group.sum_(sums)
        counts = sums.tolist()
    return counts[0] / max(counts[1], 1)


def _refusal(
    loss: float, grad_norm: float, scaler: LossScaler | None, refuse: Refuse
) -> RefusedStep | None:
    """Why the update must not be applied, the same in all processes; an overflow is counted."""
    figures = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
    if not math.isfinite(loss):
        beyond = "; activations may be beyond fp16, which ends at 65,504" if scaler else ""
        return NonFiniteStep(figures + beyond)
    if not math.isfinite(grad_norm):
        if scaler is None or scaler.is_lowest:
            return NonFiniteStep(figures)
        scale = scaler.scale
        scaler.overflowed()
        return Overflow(f"gradient beyond fp16 at loss scale {scale:,.0f}, now {scaler.scale:,.0f}")
    reason = refuse(loss, grad_norm)
    return RefusedStep(reason) if reason else None


def _sum(
    optimizer: Optimizer,
    loss_sum: torch.Tensor,
    num_targets: int,
    group: Group,
    stop: StopRequest | None,
) -> tuple[float, int, float]:
    """Over all processes: mean loss, number of targets, norm of the summed gradients.

    The votes of `stop` travel along, so that all learn in the same update that one must leave.
    """
    votes = stop.votes() if stop else []
    figures = torch.tensor([0.0, num_targets, *votes], device=loss_sum.device)
    figures[0] = loss_sum
    optimizer.sum_over(group, figures)
    total, count, *votes, norm = torch.cat((figures, optimizer.grad_norm()[None])).tolist()
    if stop:
        stop.agree(votes)
    return total / round(count), round(count), norm
