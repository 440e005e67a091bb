"""The moving average of the weights: evaluated in place of the weights, and saved as a model.

Averages of late weights often do better than the last ones. Source: Izmailov et al. 2018; with
exponential forgetting, Tarvainen and Valpola 2017, equation 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mule import fsio
from mule.train.checkpoint import folder_for_all, write_model

if TYPE_CHECKING:
    from mule.train.assemble import Parts
    from mule.train.optim import Optimizer


@contextmanager
def averaged_weights(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Compute with the averages, cast to the working precision; the old bits come back after."""
    averages = optimizer.ema_weights()
    parameters = dict(model.named_parameters())
    working = {name: parameters[name].detach().clone() for name in averages}
    _copy(averages, parameters)
    try:
        yield
    finally:
        _copy(working, parameters)


def save_ema(folder: Path, parts: Parts) -> None:
    """Write the averages as a model (or adapter) folder, in place of an older one.

    All processes of a run call it; the first writes.
    """
    averages = parts.optimizer.ema_weights()
    if parts.group.is_first:
        size = sum(tensor.numel() * tensor.element_size() for tensor in averages.values())
        fsio.require_space(folder.parent, size + 32 * 2**20, "the averaged weights")
    with folder_for_all(folder, parts.group) as out:
        write_model(averages, parts, out)


@torch.no_grad()
def _copy(weights: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)
