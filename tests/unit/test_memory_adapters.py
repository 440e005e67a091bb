"""The closed forms of memory for adapters, against what PyTorch allocates; and their FLOPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mule.adapters.lora import add_lora, lora_state
from mule.adapters.qlora import quantize_blocks
from mule.adapters.start import Start, begin, for_unchanged_base
from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.plan import memory
from mule.plan.resolve import resolve
from mule.train.optim import Optimizer
from tests.tiny import random_batch, tiny_model
from tests.unit.memory_use import memory_use
from tests.unit.test_memory_plan import DTYPES, FACTS, GROUPED, PLAIN, recipe

FUSED = replace(PLAIN, family="phi3", fused_projections=True)
ADAPTERS = {
    "lora": ("adapter.kind=lora", "adapter.lora.r=4"),
    "dropout": ("adapter.kind=lora", "adapter.lora.r=4", "adapter.lora.dropout=0.2"),
    "dora": ("adapter.kind=lora", "adapter.lora.r=4", "adapter.lora.use_dora=true"),
    "last": ("adapter.kind=lora", "adapter.lora.r=4", "adapter.lora.last_layers=2"),
    "qlora": ("adapter.kind=qlora", "adapter.lora.r=4"),
    "few": ("adapter.kind=lora", "adapter.lora.r=4", "adapter.lora.target_modules=[o_proj]"),
    "pissa": ("adapter.kind=lora", "adapter.lora.r=4", "adapter.lora.init=pissa"),
}


def settings(kind: str, *words: str) -> Recipe:
    given = ("data.train=[a.txt]", "model.path=x", *ADAPTERS[kind], *words)
    return load_recipe(None, [*given]).recipe


def adapted(found: Recipe, config: ModelConfig) -> Decoder:
    model = tiny_model(config, DTYPES[str(found.train.precision)])
    if found.adapter.kind == "qlora":
        quantize_blocks(model, double_quant=found.adapter.lora.double_quant)
    add_lora(model, found.adapter.lora)
    begin(model, found.adapter, Start(), seed=1)
    return model.train()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["lora", "dropout", "dora", "last", "qlora", "few"])
def test_what_an_adapted_model_keeps(kind: str, checkpointing: Any) -> None:
    """Within 15%, not below for adapters on some layers; the peak not below what is allocated."""
    rows, length = 5, 128
    found = settings(kind, "train.precision=fp32")
    model = adapted(found, GROUPED)
    model.set_training(recompute=checkpointing)
    use = memory_use(model, random_batch(rows, length))
    kept = memory.kept_bytes_per_token(GROUPED, found.train, checkpointing, 0, found.adapter)
    allocated = use.kept / (rows * length)
    assert allocated * 0.87 < kept < allocated * (1.5 if kind == "few" else 1.15)
    most = memory.activation_bytes_per_token(GROUPED, found.train, checkpointing, 0, found.adapter)
    head = (
        memory.loss_bytes(GROUPED, "fp32", head_trained=False)
        + memory.state_bytes(GROUPED, found, accumulates=False)["dequantized"]
    )
    assert use.peak < rows * length * most + head


@pytest.mark.parametrize("config", [GROUPED, FUSED], ids=["grouped", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_stays_for_the_whole_run(kind: str, precision: str, config: ModelConfig) -> None:
    found = settings(kind, f"train.precision={precision}")
    model = adapted(found, config)
    state = lora_state(dict(model.named_parameters()))
    saved = for_unchanged_base(model, state).values()
    size = sum(4 * tensor.numel() for tensor in saved)
    assert memory.adapter_bytes(config, found) == size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    Optimizer(model, found.optim, dtype=DTYPES[precision])
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    plan = memory.state_bytes(config, found, accumulates=False)
    assert plan["weights"] == held
    assert plan["moments"] == 8 * trained
    assert plan["masters"] == (4 * trained if precision == "bf16" else 0)


def test_the_plan_of_few_blocks_allows_more_rows() -> None:
    """What is not kept leaves room; and 4 bits leave more of it."""
    words = ("train.step_rows=512", "train.steps=5", "train.activation_checkpointing=none")
    facts = replace(FACTS, available_bytes=48 * 2**20)
    config = replace(GROUPED, num_layers=16)
    rows = {}
    for kind in ("lora", "last", "qlora"):
        resolved = resolve(settings(kind, *words), config, facts)
        rows[kind] = int(resolved.recipe.train.micro_batch_rows)
    assert rows["last"] > 3 * rows["lora"] and rows["qlora"] >= rows["lora"]


# ---------------------------------------------------------------- FLOPs


def counted_flops(model: Decoder, length: int) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model.nll_sum(random_batch(1, length)).backward()
    return counter.get_total_flops() / length


@pytest.mark.parametrize("last", [1, 2, 4])
def test_flops_below_the_first_adapted_block_are_forward_only(last: int) -> None:
    """Against PyTorch's counter, less what a tiny model's adapters take themselves."""
    length = 16
    wide = replace(GROUPED, hidden_size=256, intermediate_size=640, head_dim=64, vocab_size=89)
    model = tiny_model(wide).train()
    add_lora(model, settings("lora", f"adapter.lora.last_layers={last}").adapter.lora)
    own = 4 * 6 * sum(p.numel() for p in model.parameters() if p.requires_grad) / 4
    expected = cost.lora_flops_per_token(wide, length, last) + own
    assert counted_flops(model, length) == pytest.approx(expected, rel=0.05)


def test_flops_of_a_recipe() -> None:
    plain = recipe()
    whole = cost.train_flops_per_token(GROUPED, 64)
    assert cost.recipe_flops_per_token(GROUPED, plain.adapter, 64) == whole
    lora = cost.recipe_flops_per_token(GROUPED, settings("lora").adapter, 64)
    assert lora == cost.lora_flops_per_token(GROUPED, 64) < whole
    last = cost.recipe_flops_per_token(GROUPED, settings("last").adapter, 64)
    assert last == cost.lora_flops_per_token(GROUPED, 64, 2) < lora
    window = replace(GROUPED, sliding_window=8, sliding_layers=(0, 1))
    assert cost.train_flops_per_token(window, 64) < whole
