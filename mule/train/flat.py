"""Trained parameters in flat buffers: working weights in bf16 or fp32, masters in fp32.

The parameters become views of one buffer, their gradients views of another, so that an update is
one elementwise pass over memory and nothing is cast in the forward pass.
"""

from __future__ import annotations

import torch
from torch import nn

_ALIGNMENT = 64  # elements; keeps every view on a cache line, as fresh tensors are
NUM_FIGURES = _ALIGNMENT  # room before the summed gradients for what travels with them

Named = list[tuple[str, nn.Parameter]]


class Flat:
    """Parameters that are updated by one rule, one after the other; gaps between them stay 0."""

    def __init__(self, named: Named, dtype: torch.dtype, *, averaged: bool = False) -> None:
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
        self.grad_sum: torch.Tensor | None = None  # fp32, only when an update has several parts
        self.average = self.master.clone() if averaged else None

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The part of `flat`, one of this group's buffers, that belongs to a parameter."""
        start, shape = self.spans[name]
        return flat[start : start + shape.numel()].view(shape)
