"""The closed forms of memory of experts and state-space layers, against what PyTorch allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mule.batch import Batch
from mule.config.adapter import AdapterSection, LoraSection
from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.models import selective_scan
from mule.models.config import MambaConfig, ModelConfig, MoEConfig
from mule.models.decoder import empty_decoder
from mule.plan import block_memory, memory
from mule.train.optim import Optimizer
from tests.tiny import random_batch, tiny_model
from tests.unit.memory_use import memory_use

SIZES: dict[str, Any] = {
    "vocab_size": 89,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}
MAMBA2 = MambaConfig("mamba2", 32, 8, 16, chunk_size=32)
MAMBA1 = MambaConfig("mamba1", 16, 128, dt_rank=4, inner_norms=True)
CONFIGS = {
    "experts": ModelConfig(
        "qwen3_moe", **SIZES, intermediate_size=96, qk_norm=True, moe=MoEConfig(4, 2, 96)
    ),
    "wide experts": ModelConfig(
        "qwen3_moe", **SIZES, intermediate_size=384, qk_norm=True, moe=MoEConfig(4, 2, 384)
    ),
    "shared expert": ModelConfig(
        "granitemoeshared", **SIZES, intermediate_size=64, moe=MoEConfig(4, 2, 64, 96)
    ),
    "mamba2": ModelConfig(
        "granitemoehybrid", **SIZES, intermediate_size=160, mamba=MAMBA2, mamba_layers=(0, 1, 2)
    ),
    "hybrid": ModelConfig(
        "granitemoehybrid", **SIZES, intermediate_size=160, mamba=MAMBA2, mamba_layers=(0, 2)
    ),
    "mamba1": ModelConfig(
        "jamba", **SIZES, intermediate_size=160, mamba=MAMBA1, mamba_layers=(0, 1, 2)
    ),
}
MEASURED = [
    ("experts", "fp32", "none"),
    ("experts", "bf16", "full"),
    ("wide experts", "fp32", "none"),
    ("wide experts", "bf16", "full"),
    ("shared expert", "bf16", "selective"),
    ("mamba2", "bf16", "none"),
    ("mamba2", "fp32", "selective"),
    ("hybrid", "fp32", "none"),
    ("mamba1", "bf16", "none"),
    ("mamba1", "fp32", "selective"),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["data.train=[a.txt]", "model.size=2m", *overrides]).recipe


@pytest.mark.parametrize(("name", "precision", "checkpointing"), MEASURED)
def test_what_is_kept(name: str, precision: str, checkpointing: Any) -> None:
    """Within 8% of what is allocated, and the peak not below it."""
    config, settings = CONFIGS[name], recipe(f"train.precision={precision}")
    batch: Batch = random_batch(3, 96)
    tokens = 3 * 96
    model = tiny_model(config, DTYPES[precision]).train()
    model.set_training(recompute=checkpointing)
    use = memory_use(model, batch)
    head = config.vocab_size * config.hidden_size * memory.width(precision)
    kept = memory.kept_bytes_per_token(config, settings.train, checkpointing)
    assert kept == pytest.approx((use.kept - head) / tokens, rel=0.08)
    most = tokens * memory.activation_bytes_per_token(config, settings.train, checkpointing)
    beside = memory.state_bytes(config, settings, accumulates=False)["experts_at_work"]
    assert use.peak < most + memory.loss_bytes(config, precision) + beside


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_the_optimizer_holds(kind: str, name: str) -> None:
    """Of masters and moments, but for what rounds a tensor up to a cache line."""
    config, settings = CONFIGS[name], recipe(f"optim.kind={kind}", "train.precision=fp32")
    found = memory.state_bytes(config, settings, accumulates=False)
    optimizer = Optimizer(tiny_model(config), settings.optim)
    assert optimizer.state_bytes() == pytest.approx(found["weights"] + found["moments"], rel=0.03)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_adapters_take(name: str) -> None:
    """Those of the modules, by name and shape: not routers, experts or convolutions."""
    config = CONFIGS[name]
    model = empty_decoder(config, torch.float32, "meta")
    for number, block in enumerate(model.model.layers):
        linear = {
            key: (module.in_features, module.out_features)
            for key, module in block.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        assert linear == block_memory.linear_layers(config, number)


def test_an_adapter_keeps_experts_frozen() -> None:
    settings = recipe("train.precision=fp32").model_copy(
        update={"adapter": AdapterSection(kind="lora", lora=LoraSection(r=4))}
    )
    found = memory.state_bytes(CONFIGS["experts"], settings, accumulates=False)
    assert found["experts_at_work"] == 0
    attention = 4 * (64 + 64 + 2 * (64 + 32) + 64 + 64)
    assert found["moments"] == 8 * 3 * attention


def test_constants_are_those_of_the_code_they_describe() -> None:
    assert block_memory._SCAN_PIECE == selective_scan._PIECE
