"""State-space layers: Mamba-2 and Mamba-1, and what their weights begin as."""

from __future__ import annotations

import math

import torch
from torch import nn

from mule.models.config import ModelConfig
from mule.models.mamba1 import Mamba1
from mule.models.mamba2 import Mamba2

_STEPS = (1e-3, 0.1)  # the steps that a layer's channels or heads begin with lie between these
_DECAYS = (1.0, 16.0)  # and Mamba-2's decays between these


def new_mamba(config: ModelConfig, layer: int) -> nn.Module:
    """The state-space layer of a block."""
    assert config.mamba is not None
    return Mamba1(config, layer) if config.mamba.kind == "mamba1" else Mamba2(config, layer)


def first_values(
    config: ModelConfig, name: str, weight: torch.Tensor, generator: torch.Generator
) -> torch.Tensor | None:
    """What a weight of a state-space layer begins as, fp32; None: as those of other layers do.

    Source: `Mamba` and `Mamba2` of the mamba_ssm package. The classes of transformers begin all heads
    with a step of 1.3, which forgets everything at once: they are not made to be trained from.
    """
    part = name.rpartition(".mamba.")[2]
    if config.mamba is None or part == name:
        return None
    fresh = torch.empty(weight.shape, dtype=torch.float32)
    if part in ("dt_bias", "dt_proj.bias"):
        low, high = map(math.log, _STEPS)
        step = fresh.uniform_(low, high, generator=generator).exp()
        return step + torch.log(-torch.expm1(-step))  # softplus gives the step
    if part == "A_log":
        if weight.dim() == 1:
            return fresh.uniform_(*_DECAYS, generator=generator).log()
        return torch.arange(1.0, weight.shape[1] + 1).log().expand(weight.shape)
    if part in ("conv1d.weight", "conv1d.bias"):
        bound = config.mamba.conv_kernel**-0.5
        return fresh.uniform_(-bound, bound, generator=generator)
    if part == "dt_proj.weight":
        bound = weight.shape[1] ** -0.5
        return fresh.uniform_(-bound, bound, generator=generator)
    return None
