"""QLoRA's base: the blocks' linear layers in 4 bits, made as the weights are read.

Embeddings, norms, biases and the head stay in the working precision. Source: Dettmers et al. 2023.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mule.adapters.nf4 import NF4Linear
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.models.folder import load_weights


def load_quantized(
    folder: Path | str, config: ModelConfig, dtype: torch.dtype, *, double_quant: bool
) -> Decoder:
    """The decoder of a folder, each matrix of its blocks in 4 bits as soon as it is read.

    Memory is that of the result, and of one weight at a time.
    """
    model = _without_matrices(config, dtype)
    matrices = block_matrices(model)

    def fill(name: str, parameter: torch.Tensor, tensor: torch.Tensor) -> None:
        if name in matrices:
            _quantize(model, matrices[name], tensor, double_quant=double_quant)
        else:
            parameter.copy_(tensor)

    load_weights(model, folder, fill=fill)
    return model


def _without_matrices(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """A decoder whose weights are allocated, but for the blocks' matrices."""
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    matrices = block_matrices(model)
    for name, parameter in list(model.named_parameters()):
        if name not in matrices:
            owner, _, attribute = name.rpartition(".")
            allocated = nn.Parameter(torch.empty_like(parameter, device="cpu"))
            setattr(model.get_submodule(owner), attribute, allocated)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def quantize_blocks(model: Decoder, *, double_quant: bool) -> None:
    """Put the matrices of a model's blocks into 4 bits, in place."""
    for name in block_matrices(model).values():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        _quantize(model, name, weight, double_quant=double_quant)


def block_matrices(model: Decoder) -> dict[str, str]:
    """The blocks' linear layers, by the names of their weights."""
    return {
        f"{name}.weight": name
        for name, module in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(module, nn.Linear)
    }


def _quantize(model: Decoder, name: str, weight: torch.Tensor, *, double_quant: bool) -> None:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    quantized = NF4Linear(weight, linear.bias, double_quant=double_quant)
    model.set_submodule(name, quantized)
