"""The training loss without logits in memory.

The head's product, the softmax and their gradients are made chunk by chunk in the forward pass, so
that (tokens, vocabulary) never exists, in any precision. Logits are in the weights' precision, sums
in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from mule.batch import IGNORE

CHUNK_TOKENS = 512  # between the slower 64 and 1,024 of a first trial (docs/log.md)

# Trained rows are filled up to a multiple of this: every update would bring new shapes otherwise,
# which fragments memory (0.4 GB to 1.2 GB in 400 updates) and makes compiled code start over.
PAD_TOKENS = 128

Kernel = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def softmax_nll(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood (fp32 scalar) and its gradient, for logits (N, V).

    The gradient is softmax minus one-hot, in the logits' precision; zero where nothing is trained.
    """
    scores = logits.float()
    trained = targets != IGNORE
    peak = scores.amax(-1, keepdim=True)
    exponentials = (scores - peak).exp()
    total = exponentials.sum(-1, keepdim=True)
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    is_target = vocabulary == targets[:, None]  # IGNORE is negative: never equal
    at_target = torch.where(is_target, scores - peak, 0.0).sum(-1)
    nll = torch.where(trained, total.squeeze(-1).log() - at_target, 0.0).sum()
    gradient = (exponentials / total - is_target.float()) * trained[:, None]
    return nll, gradient.to(logits.dtype)


def nll_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    kernel: Kernel = softmax_nll,
) -> torch.Tensor:
    """Sum over trained tokens of -log p(target), fp32 scalar, differentiable.

    hidden (B, T, E), weight (V, E), targets (B, T). Rows whose target is IGNORE cost nothing.
    """
    targets = targets.flatten()
    hidden = hidden.flatten(0, 1)
    rows = (targets != IGNORE).nonzero().squeeze(-1)
    if rows.numel() != targets.numel():
        padding = rows.new_zeros(-rows.numel() % PAD_TOKENS)
        hidden = hidden[torch.cat((rows, padding))]
        targets = F.pad(targets[rows], (0, padding.numel()), value=IGNORE)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedNLL.apply(hidden, weight, targets, kernel)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, goal in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS)):
        total = total + kernel(part @ weight.T, goal)[0]
    return total


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, kernel):  # type: ignore[override]
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK_TOKENS):
            rows = hidden[start : start + CHUNK_TOKENS]
            nll, grad_logits = kernel(rows @ weight.T, targets[start : start + CHUNK_TOKENS])
            total += nll
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + CHUNK_TOKENS])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, rows)
        ctx.gradients = (grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients
        scaled = (g if g is None else g.mul_(grad_total) for g in (grad_hidden, grad_weight))
        return (*scaled, None, None)
