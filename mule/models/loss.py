"""The training loss without logits in memory.

The head's product, the softmax and their gradients are made chunk by chunk in the forward pass, so
that (tokens, vocabulary) never exists, in any precision. Logits are in the weights' precision, sums
in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from mule.batch import IGNORE
from mule.models import native_loss

CHUNK_TOKENS = 512  # 128, 256 and 1,024 are slower (docs/log.md)
_DEVICE_CHUNK_TOKENS = 4096  # a guess: no GPU has been measured; 512 rows do not fill one

# Trained rows are filled up to a multiple of this: every update would bring new shapes otherwise,
# which fragments memory (0.4 GB to 1.2 GB in 400 updates) and makes compiled code start over.
PAD_TOKENS = 128

# Logits of so many numbers at once stay in a processor's caches when nothing is compiled: more than
# twice the speed of 256 rows of 151,936 at once (docs/log.md).
_CACHED_LOGITS = 1 << 21

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def softmax_nll_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    grad_scale: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
) -> torch.Tensor:
    """Summed negative log-likelihood (fp32 scalar) of logits (N, V), which become its gradient.

    The gradient is softmax minus one-hot, in the logits' precision; zero where nothing is trained.
    `grad_scale`, an fp32 scalar, multiplies it before it is rounded. With a `softcap` the softmax
    is of softcap * tanh(logits / softcap).
    """
    trained = targets != IGNORE
    scores = logits.float()
    slope = None
    if softcap is not None:
        bent = (scores / softcap).tanh()
        scores, slope = bent * softcap, 1 - bent * bent
    scores = scores - scores.amax(-1, keepdim=True)
    at_target = scores.gather(-1, targets.clamp_min(0)[:, None]).squeeze(-1)
    p = scores.exp_()
    total = p.sum(-1, keepdim=True)
    nll = torch.where(trained, total.squeeze(-1).log() - at_target, 0.0).sum()
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    is_target = vocabulary == targets[:, None]  # IGNORE is negative: never equal
    weights = trained if grad_scale is None else trained * grad_scale
    gradient = p.div_(total).sub_(is_target.float()).mul_(weights[:, None])
    if slope is not None:
        gradient = gradient * slope
    logits.copy_(gradient)
    return nll


def softmax_nll_by_rows_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    grad_scale: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
) -> torch.Tensor:
    """`softmax_nll_` for eager PyTorch: in C++ on a CPU, or a few rows at once, since each operation
    is a pass."""
    if native_loss.serves(logits):
        return native_loss.softmax_nll_(logits, targets, grad_scale, softcap)
    if logits.device.type != "cpu" or logits.numel() <= _CACHED_LOGITS:
        return softmax_nll_(logits, targets, grad_scale, softcap=softcap)
    total = logits.new_zeros((), dtype=torch.float32)
    num_rows = max(1, _CACHED_LOGITS // logits.shape[-1])
    for rows, goals in zip(logits.split(num_rows), targets.split(num_rows), strict=True):
        trained, places = goals != IGNORE, goals.clamp_min(0)[:, None]
        scores, slope = rows.float(), None
        if softcap is not None:
            bent = (scores / softcap).tanh()
            scores, slope = bent * softcap, 1 - bent * bent
        log_p = F.log_softmax(scores, -1)
        total -= torch.where(trained, log_p.gather(-1, places).squeeze(-1), 0.0).sum()
        gradient = log_p.exp_()
        gradient.scatter_add_(-1, places, gradient.new_full(places.shape, -1.0))
        weights = trained if grad_scale is None else trained * grad_scale
        gradient.mul_(weights[:, None])
        rows.copy_(gradient if slope is None else gradient.mul_(slope))
    return total


def compiled_softmax_nll_() -> Kernel:
    """`softmax_nll_`, compiled where it is not in C++ already."""
    compiled = torch.compile(softmax_nll_, dynamic=True)

    def kernel(
        logits: torch.Tensor,
        targets: torch.Tensor,
        grad_scale: torch.Tensor | None = None,
        *,
        softcap: float | None = None,
    ) -> torch.Tensor:
        chosen = softmax_nll_by_rows_ if native_loss.serves(logits) else compiled
        return chosen(logits, targets, grad_scale, softcap=softcap)

    return kernel


def nll_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    kernel: Kernel = softmax_nll_,
    grad_scale: float = 1.0,
    *,
    num_targets: int | None = None,
) -> torch.Tensor:
    """Sum over trained tokens of -log p(target), fp32 scalar, differentiable.

    hidden (B, T, E), weight (V, E), targets (B, T). Rows whose target is IGNORE cost nothing.
    Its gradient comes times `grad_scale`, for fp16, in which softmax minus one-hot would vanish.
    With `num_targets` known, a device need not be asked whether every row is trained.
    """
    targets = targets.flatten()
    hidden = hidden.flatten(0, 1)
    if num_targets != targets.numel():
        rows = (targets != IGNORE).nonzero().squeeze(-1)
        padding = rows.new_zeros(-rows.numel() % PAD_TOKENS)
        hidden = hidden[torch.cat((rows, padding))]
        targets = F.pad(targets[rows], (0, padding.numel()), value=IGNORE)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        # A tensor: compiled code would start over with every new number.
        scale = None if grad_scale == 1.0 else hidden.new_full((), grad_scale, dtype=torch.float32)
        return _ChunkedNLL.apply(hidden, weight, targets, kernel, scale)
    total = hidden.new_zeros((), dtype=torch.float32)
    for _, logits, goals in _chunks(hidden, weight, targets):
        total += kernel(logits, goals, None)
    return total


def nll_sum_of_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    kernel: Kernel = softmax_nll_,
    grad_scale: float = 1.0,
) -> torch.Tensor:
    """`nll_sum` of logits (B, T, V) that are there already, and stay as they are."""
    logits, targets = logits.flatten(0, 1), targets.flatten()
    if torch.is_grad_enabled() and logits.requires_grad:
        scale = None if grad_scale == 1.0 else logits.new_full((), grad_scale, dtype=torch.float32)
        return _LogitsNLL.apply(logits, targets, kernel, scale)
    total = logits.new_zeros((), dtype=torch.float32)
    for part, goals in _in_chunks(logits, targets):
        total += kernel(part.clone(), goals, None)
    return total


def nll_of_targets(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """-log p of each target that is not IGNORE, fp32 (N,), in the order of the rows; for evaluation.

    hidden (B, T, E), weight (V, E), targets (B, T). Only the rows of those targets are computed.
    """
    chosen = targets != IGNORE
    found = [hidden.new_zeros(0, dtype=torch.float32)]
    for part, goals in zip(hidden[chosen].split(CHUNK_TOKENS), targets[chosen].split(CHUNK_TOKENS)):
        found += _nll_of_rows(part @ weight.T, goals, softcap)
    return torch.cat(found)


def nll_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`nll_of_targets` of logits (B, T, V) that are there already."""
    chosen = targets != IGNORE
    none = logits.new_zeros(0, dtype=torch.float32)
    return torch.cat([none, *_nll_of_rows(logits[chosen], targets[chosen], None)])


def _nll_of_rows(
    logits: torch.Tensor, goals: torch.Tensor, softcap: float | None
) -> Iterator[torch.Tensor]:
    """-log p of each row's goal, a few rows at once."""
    num_rows = max(1, _CACHED_LOGITS // logits.shape[-1])
    for few, aims in zip(logits.split(num_rows), goals.split(num_rows)):
        scores = few.float()
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        yield F.cross_entropy(scores, aims, reduction="none")


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(rows, logits, targets) of one chunk after the other; the logits are in the same memory.

    Fresh memory for each would cost more than what is computed in it: the system clears it page by
    page (docs/log.md). The last chunk's logits and targets are filled up to the same shape.
    """
    size = CHUNK_TOKENS if hidden.device.type == "cpu" else _DEVICE_CHUNK_TOKENS
    logits = hidden.new_empty(min(size, len(hidden)), len(weight))
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        num_rows = rows.stop - start
        torch.mm(hidden[rows], weight.T, out=logits[:num_rows])
        yield rows, logits, F.pad(targets[rows], (0, len(logits) - num_rows), value=IGNORE)


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, kernel, grad_scale):  # type: ignore[override]
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = None
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, logits, goals in _chunks(hidden, weight, targets):
            total += kernel(logits, goals, grad_scale)
            grad_logits = logits[: rows.stop - rows.start]
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
            elif want_weight:  # zeros to begin with would be one more pass over fresh memory
                grad_weight = grad_logits.T @ hidden[rows]
        if want_weight and grad_weight is None:  # no row is trained
            grad_weight = torch.zeros_like(weight)
        ctx.gradients = (grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients
        scaled = (g if g is None else g.mul_(grad_total) for g in (grad_hidden, grad_weight))
        return (*scaled, None, None, None)


def _in_chunks(
    logits: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of logits (N, V) and targets (N,), some rows at once."""
    size = CHUNK_TOKENS if logits.device.type == "cpu" else _DEVICE_CHUNK_TOKENS
    return zip(logits.split(size), targets.split(size))


class _LogitsNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, kernel, grad_scale):  # type: ignore[override]
        gradient = logits.clone(memory_format=torch.contiguous_format)
        total = logits.new_zeros((), dtype=torch.float32)
        for part, goals in _in_chunks(gradient, targets):
            total += kernel(part, goals, grad_scale)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx, grad_total):  # type: ignore[override]
        gradient = ctx.gradient
        del ctx.gradient
        return gradient.mul_(grad_total), None, None, None
