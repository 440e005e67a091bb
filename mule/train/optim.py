"""AdamW over flat buffers: working weights in bf16 or fp32, masters and moments in fp32.

The trainable parameters become views of one buffer, their gradients views of another, so that an
update is one elementwise pass over memory, the gradient norm one reduction, and nothing is cast in
the forward pass. Source: Loshchilov and Hutter 2019, algorithm 2, with PyTorch's decoupled form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mule.train.distributed import Group

_ALIGNMENT = 64  # elements; keeps every view on a cache line, as fresh tensors are
_NUM_FIGURES = _ALIGNMENT  # room before the summed gradients for what travels with them


@dataclass(frozen=True)
class AdamWSettings:
    """Hyper-parameters that stay fixed during a run."""

    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8


class _Group:
    """Parameters with one weight decay, flattened."""

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], weight_decay: float, dtype: torch.dtype
    ) -> None:
        self.weight_decay = weight_decay
        self.spans: dict[str, tuple[int, torch.Size]] = {}
        size = 0
        for name, parameter in named:
            self.spans[name] = (size, parameter.shape)
            size += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        self.master = torch.zeros(size, device=named[0][1].device)
        for name, parameter in named:
            self.view(self.master, name).copy_(parameter.data)
        # In fp32 the masters are the working weights.
        self.weight = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.grad = torch.zeros_like(self.weight)
        for name, parameter in named:
            parameter.data = self.view(self.weight, name)
            parameter.grad = self.view(self.grad, name)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.grad_sum: torch.Tensor | None = None  # fp32, only when an update has several parts

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        start, shape = self.spans[name]
        return flat[start : start + shape.numel()].view(shape)


def _adamw(
    weight: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    scalars: torch.Tensor,
) -> None:
    """One update in place; `scalars` holds lr, decay, beta1, beta2, eps, bias1, bias2, clip."""
    lr, decay, beta1, beta2, eps, bias1, bias2, clip = scalars.unbind()
    g = grad.float() * clip
    exp_avg.copy_(exp_avg * beta1 + g * (1 - beta1))
    exp_avg_sq.copy_(exp_avg_sq * beta2 + g * g * (1 - beta2))
    denominator = (exp_avg_sq / bias2).sqrt() + eps
    master.copy_(master * (1 - lr * decay) - lr * (exp_avg / bias1) / denominator)
    weight.copy_(master)


class AdamW:
    """Takes the model's trainable parameters over: after this, they live in flat buffers of `dtype`.

    Decay acts on matrices only: norms, biases and embeddings are left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: AdamWSettings,
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.settings = settings
        self.num_updates = 0
        self._summed = False  # whether this update's gradients are in the sums
        self._sums: torch.Tensor | None = None  # the groups' grad_sum, one after the other
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        decayed = [(n, p) for n, p in trained if p.dim() >= 2 and "embed_tokens" not in n]
        kept = [(n, p) for n, p in trained if not (p.dim() >= 2 and "embed_tokens" not in n)]
        groups = ((decayed, settings.weight_decay), (kept, 0.0))
        self._groups = [_Group(named, decay, dtype) for named, decay in groups if named]
        self._kernel = torch.compile(_adamw, dynamic=True) if compiled else _adamw

    def accumulate(self) -> None:
        """Add the gradients of one micro-batch to fp32 sums and clear them."""
        if self._sums is None:
            self._sums = self._make_sums()
        for group in self._groups:
            assert group.grad_sum is not None
            group.grad_sum.add_(group.grad)
            group.grad.zero_()
        self._summed = True

    def sum_over(self, group: Group, figures: torch.Tensor) -> None:
        """Sum the accumulated gradients, and `figures` (n,) fp32 in place, over all processes.

        One message, in fp32 whatever the weights are; an integer is exact up to 2**24.
        """
        assert self._summed and self._sums is not None and len(figures) <= _NUM_FIGURES
        room = self._sums[: len(figures)]
        room.copy_(figures)
        group.sum_(self._sums)
        figures.copy_(room)

    def grad_norm(self) -> torch.Tensor:
        """Euclidean norm of all gradients, fp32 scalar."""
        norms = [
            torch.linalg.vector_norm(self._gradient(group), dtype=torch.float32)
            for group in self._groups
        ]
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update the weights from the gradients times `grad_scale`, and clear the gradients."""
        self.num_updates += 1
        s = self.settings
        biases = (1 - s.beta1**self.num_updates, 1 - s.beta2**self.num_updates)
        for group in self._groups:
            scalars = torch.tensor(
                [lr, group.weight_decay, s.beta1, s.beta2, s.eps, *biases, grad_scale],
                device=group.weight.device,
            )
            self._kernel(
                group.weight,
                group.master,
                group.exp_avg,
                group.exp_avg_sq,
                self._gradient(group),
                scalars,
            )
        self.zero_grad()

    def zero_grad(self) -> None:
        """Clear the gradients in place; they stay views of the flat buffers."""
        for group in self._groups:
            group.grad.zero_()
            if group.grad_sum is not None:
                group.grad_sum.zero_()
        self._summed = False

    def master_weights(self) -> dict[str, torch.Tensor]:
        """fp32 masters of the trained parameters, by name."""
        return {name: group.view(group.master, name) for group, name in self._named()}

    def moments(self) -> dict[str, torch.Tensor]:
        """First and second moments, as `exp_avg.<name>` and `exp_avg_sq.<name>`."""
        state = {}
        for group, name in self._named():
            state[f"exp_avg.{name}"] = group.view(group.exp_avg, name)
            state[f"exp_avg_sq.{name}"] = group.view(group.exp_avg_sq, name)
        return state

    @torch.no_grad()
    def refresh_working_weights(self) -> None:
        """Cast the masters to the working weights, after masters were loaded."""
        for group in self._groups:
            group.weight.copy_(group.master)

    def digest(self) -> int:
        """A number (under 2**62) that changes with any bit of masters and moments."""
        state = (t for g in self._groups for t in (g.master, g.exp_avg, g.exp_avg_sq))
        sums = [tensor.view(torch.int32).sum(dtype=torch.int64) for tensor in state]
        return (
            sum(value * (2 * i + 1) for i, value in enumerate(torch.stack(sums).tolist())) % 2**62
        )

    def state_bytes(self) -> int:
        """Memory of masters and moments."""
        return sum(
            tensor.numel() * tensor.element_size()
            for group in self._groups
            for tensor in (group.master, group.exp_avg, group.exp_avg_sq)
        )

    def _make_sums(self) -> torch.Tensor:
        """One fp32 buffer for the sums of all groups, after room for figures."""
        size = _NUM_FIGURES + sum(group.grad.numel() for group in self._groups)
        sums = torch.zeros(size, device=self._groups[0].grad.device)
        start = _NUM_FIGURES
        for group in self._groups:
            group.grad_sum = sums[start : start + group.grad.numel()]
            start += group.grad.numel()
        return sums

    def _named(self) -> Iterator[tuple[_Group, str]]:
        for group in self._groups:
            for name in group.spans:
                yield group, name

    def _gradient(self, group: _Group) -> torch.Tensor:
        if self._summed and group.grad_sum is not None:
            return group.grad_sum
        return group.grad
