"""Tiny models with state-space layers, and the recurrences written token by token in fp64."""

from __future__ import annotations

import dataclasses

import torch

from mule.models.config import MambaConfig, ModelConfig
from mule.models.decoder import Decoder
from mule.models.ssd import Inputs
from tests.tiny import TINY, tiny_model

MAMBA2 = MambaConfig(
    kind="mamba2", state_size=7, num_heads=8, head_dim=6, num_groups=2, chunk_size=16
)
MAMBA1 = MambaConfig(
    kind="mamba1", state_size=5, num_heads=48, dt_rank=3, conv_kernel=3, inner_norms=True
)


def hybrid(kind: str, attending: tuple[int, ...] = (1,), **more: object) -> ModelConfig:
    """TINY with state-space layers in the blocks that do not attend."""
    mamba2 = kind == "mamba2"
    return dataclasses.replace(
        TINY,
        family="granitemoehybrid" if mamba2 else "jamba",
        qk_norm=False,
        attention_scale=0.3 if mamba2 else None,
        mamba=MAMBA2 if mamba2 else MAMBA1,
        mamba_layers=tuple(i for i in range(TINY.num_layers) if i not in attending),
        nope_layers=attending,
        **more,  # type: ignore[arg-type]
    )


PURE2, PURE1 = hybrid("mamba2", ()), hybrid("mamba1", ())
HYBRID2, HYBRID1 = hybrid("mamba2"), hybrid("mamba1")
ALL = {"mamba2": PURE2, "mamba1": PURE1, "hybrid2": HYBRID2, "hybrid1": HYBRID1}


def loud_model(config: ModelConfig, seed: int = 1) -> Decoder:
    """Its layers matter: at their first size what they add is small."""
    model = tiny_model(config, seed=seed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.endswith("A_log"):
                parameter.mul_(5.0)
    return model


def sequential_ssd(
    inputs: Inputs, segments: torch.Tensor | None = None, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `ssd` computes, one token after the other, in fp64."""
    x, dt, a, b, c = (tensor.double() for tensor in inputs)
    rows, length, groups, heads, channels = x.shape
    shape = (rows, groups, b.shape[-1], heads, channels)
    s = x.new_zeros(shape) if state is None else state.double().view(shape)
    found = []
    for t in range(length):
        if segments is not None and t:
            s = s * (segments[:, t] == segments[:, t - 1])[:, None, None, None, None]
        decay = (dt[:, t] * a).exp()[:, :, None, :, None]
        s = s * decay + torch.einsum("rgn,rgh,rghp->rgnhp", b[:, t], dt[:, t], x[:, t])
        found.append(torch.einsum("rgn,rgnhp->rghp", c[:, t], s))
    return torch.stack(found, 1), s.flatten(3)


def sequential_scan(
    tensors: tuple[torch.Tensor, ...], begins: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `selective_scan` computes of dt, dtx, a, b and c, one token after the other."""
    dt, dtx, a, b, c = tensors
    h, found = state.to(dt.dtype), []
    for t, begin in enumerate(begins.unbind(1)):
        decay = (dt[:, t, :, None] * a).exp() * ~begin[:, None, None]
        h = decay * h + dtx[:, t, :, None] * b[:, t, None]
        found.append((h * c[:, t, None]).sum(-1))
    return torch.stack(found, 1), h
