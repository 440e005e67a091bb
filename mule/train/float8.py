"""float8 training: the products of the blocks' linear layers in 8 bits, through torchao.

Weights, activations and gradients of a product are cast to e4m3 or e5m2 just before it, each tensor
with the scale that its largest value needs now; everything else stays bf16 with fp32 masters.
Source: Micikevicius et al. 2022, FP8 formats for deep learning; torchao's tensorwise recipe.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from torch import nn

from mule import progress
from mule.errors import UserError
from mule.models.decoder import Decoder

if TYPE_CHECKING:
    from types import ModuleType

_MULTIPLE = 16  # of both dimensions of a matrix: what the GPUs' float8 products ask for


def use_float8(model: Decoder, *, emulate: bool = False) -> int:
    """Replace the blocks' linear layers in place; how many. Parameters and their names stay.

    The head, a LoRA's matrices, and layers whose dimensions 16 does not divide remain as they are.
    Before the optimizer and `compile_regions`. `emulate` computes the products in fp32 from values
    rounded to float8, on any machine. UserError when torchao is missing or no layer can change.
    """
    float8 = _torchao_float8()
    layers = [
        name
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    ]
    odd = [name for name in layers if not _fits(model.model.layers.get_submodule(name))]
    chosen = set(layers) - set(odd)
    if not chosen:
        raise UserError(
            f"train.precision = fp8 changes nothing: {_MULTIPLE} does not divide the dimensions of "
            "any layer",
            "set train.precision=bf16",
        )
    # A row of grad_weight's product is a micro-batch's tokens, which may be any number.
    config = dataclasses.replace(
        float8.Float8LinearConfig.from_recipe_name("tensorwise"),
        pad_inner_dim=True,
        emulate=emulate,
    )
    float8.convert_to_float8_training(
        model.model.layers, module_filter_fn=lambda _, name: name in chosen, config=config
    )
    if odd:
        progress.note(
            f"float8: {len(odd)} of {len(layers)} layers stay in bf16, since {_MULTIPLE} does not "
            "divide their dimensions",
            "warning",
        )
    return len(chosen)


def _fits(layer: nn.Module) -> bool:
    assert isinstance(layer, nn.Linear)
    return layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0


def _torchao_float8() -> ModuleType:
    """torchao.float8, without what its import says on stderr about libraries it can do without."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import torchao.float8 as float8
    except ImportError:
        raise UserError(
            "train.precision = fp8 needs torchao, which is not installed",
            "pip install 'mule[fp8]', or set train.precision=bf16",
        ) from None
    finally:
        logging.disable(disabled)
    return float8
