"""How much an adapter changes its base, beside the change computed from whole matrices."""

from __future__ import annotations

import pytest
import torch

from mule.adapters.effect import AdapterEffect
from mule.adapters.lora import add_lora, dense_weight, lora_layers
from mule.config.adapter import LoraSection
from tests.tiny import tiny_model


@pytest.mark.parametrize("dora", [False, True])
def test_the_change_is_that_of_the_matrices(dora: bool) -> None:
    model = tiny_model()
    add_lora(model, LoraSection(r=3, alpha=6, use_dora=dora))
    effect = AdapterEffect(model)
    assert effect.change() == pytest.approx(0.0, abs=1e-6)
    changed = weights = 0.0
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.weight.normal_(std=0.02)
            update = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
            changed += float(update.square().sum())
            weights += float(dense_weight(layer.base_layer).square().sum())
    assert effect.change() == pytest.approx((changed / weights) ** 0.5, rel=1e-4)


def test_moved_magnitudes_are_a_change_and_no_adapter_is_none() -> None:
    assert AdapterEffect(tiny_model()).change() is None
    model = tiny_model()
    add_lora(model, LoraSection(r=3, alpha=6, use_dora=True))
    effect = AdapterEffect(model)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            assert layer.lora_magnitude_vector is not None
            layer.lora_magnitude_vector.mul_(1.1)
    assert effect.change() == pytest.approx(0.1, rel=1e-3)
