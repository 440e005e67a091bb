"""The closed forms of memory against what PyTorch allocates, and what is decided by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mule.adapters.lora import add_lora
from mule.batch import Batch
from mule.config.adapter import AdapterSection, LoraSection
from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.models import attention, loss, native_attention
from mule.models.config import ModelConfig
from mule.models.decoder import empty_decoder
from mule.plan import block_memory, memory
from mule.plan.micro_batch import Timing, candidates, fastest, largest_even_part
from mule.plan.resolve import Facts, Resolved, resolve
from mule.train import rules
from mule.train.optim import Optimizer
from tests.tiny import TINY, random_batch, tiny_model
from tests.unit.memory_use import memory_use

GROUPED = replace(TINY, hidden_size=64, head_dim=16, intermediate_size=160, num_layers=4)
PLAIN = replace(
    TINY, family="llama", qk_norm=False, hidden_size=96, num_heads=6, num_kv_heads=6, head_dim=16
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FACTS = Facts(
    num_rows=10_000,
    row_length=256,
    targets_per_row=256,
    examples_per_row=1,
    cpu_cores=2,
    fast_bf16=False,
    cpp_compiler=False,
    available_bytes=16 * 2**30,
    matmul_peak_flops=1e11,
)


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["data.train=[a.txt]", "model.size=2m", *overrides]).recipe


def resolved(*overrides: str, config: ModelConfig = GROUPED, **facts: Any) -> Resolved:
    return resolve(recipe(*overrides), config, replace(FACTS, **facts))


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [GROUPED, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_what_is_kept(config: ModelConfig, precision: str, checkpointing: Any) -> None:
    """Within 15% of what is allocated, with dropout and without, and the peak not below it."""
    rows, length = 5, 128
    for dropout in (0.0, 0.2):
        train = recipe(f"train.precision={precision}", f"train.dropout={dropout}").train
        model = tiny_model(config, DTYPES[precision]).train()
        model.set_training(dropout=dropout, recompute=checkpointing)
        use = memory_use(model, random_batch(rows, length))
        head = config.vocab_size * config.hidden_size * memory.width(precision)
        kept = memory.kept_bytes_per_token(config, train, checkpointing)
        assert kept == pytest.approx((use.kept - head) / (rows * length), rel=0.15)
        most = memory.activation_bytes_per_token(config, train, checkpointing)
        assert use.peak < rows * length * most + memory.loss_bytes(config, precision)


@pytest.mark.parametrize("dense", [True, False])
def test_a_mask_is_kept_too(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In packed rows, where attention does not go by document."""
    rows, length = 3, 192
    config, train = PLAIN, recipe("train.precision=fp32", "train.device=cpu").train
    assert memory.mask_length(config, train, length, isolated=True) == 0  # C++ needs no mask
    monkeypatch.setattr(native_attention, "serves", lambda *_: False)
    monkeypatch.setattr(memory, "attends_natively", lambda *_: False)
    monkeypatch.setattr(attention, "_DENSE_TOKENS", length if dense else length - 1)
    monkeypatch.setattr(memory, "_DENSE_TOKENS", length if dense else length - 1)
    segments = (torch.arange(length) // 50 + 1).expand(rows, length).contiguous()
    batch: Batch = replace(random_batch(rows, length), segments=segments, isolated=True)
    mask_length = memory.mask_length(config, train, length, isolated=True)
    assert mask_length == (length if dense else 0)
    use = memory_use(tiny_model(PLAIN).train(), batch)
    head = PLAIN.vocab_size * PLAIN.hidden_size * 4
    kept = memory.kept_bytes_per_token(PLAIN, train, "none", mask_length)
    assert kept == pytest.approx((use.kept - head) / (rows * length), rel=0.1)
    elsewhere = recipe("train.device=cuda").train
    assert memory.mask_length(config, elsewhere, length, isolated=True) == length
    assert memory.mask_length(config, elsewhere, length, isolated=False) == 0


def test_less_is_kept_the_more_is_computed_again() -> None:
    train = recipe("train.precision=bf16").train
    for forms in (memory.kept_bytes_per_token, memory.activation_bytes_per_token):
        none, selective, full = (forms(GROUPED, train, k) for k in ("none", "selective", "full"))
        assert none > selective > full > 0


def test_constants_are_those_of_the_code_they_describe() -> None:
    assert memory._LOSS_CHUNK_TOKENS == loss.CHUNK_TOKENS
    assert memory._DENSE_TOKENS == attention._DENSE_TOKENS
    assert block_memory._NATIVE_CHANNELS == native_attention._CHANNELS
    assert memory._MIN_8BIT_ELEMENTS == rules._MIN_8BIT_ELEMENTS


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
def test_what_the_optimizer_holds(kind: str, tied: bool, precision: str) -> None:
    """Of masters, moments and averages, but for what rounds a tensor up to a cache line."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    config = replace(GROUPED, tie_embeddings=tied, vocab_size=257)
    settings = recipe(f"optim.kind={kind}", f"train.precision={precision}", "optim.ema_decay=0.9")
    found = memory.state_bytes(config, settings, accumulates=True)
    optimizer = Optimizer(tiny_model(config), settings.optim, dtype=DTYPES[precision])
    held = found["moments"] + found["average"]
    held += found["masters"] if precision == "bf16" else found["weights"]
    assert optimizer.state_bytes() == pytest.approx(held, rel=0.02)


def test_bytes_of_a_weight() -> None:
    """16 a weight with AdamW whatever the precision, and 4 for the sums of several parts."""
    params = sum(p.numel() for p in tiny_model(GROUPED).parameters())
    for precision in ("fp32", "bf16", "fp16", "fp8"):
        settings = recipe(f"train.precision={precision}")
        whole = memory.state_bytes(GROUPED, settings, accumulates=False)
        assert sum(whole.values()) == 16 * params
        parts = memory.state_bytes(GROUPED, settings, accumulates=True)
        assert sum(parts.values()) == 20 * params


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_hold_little(targets: Any) -> None:
    lora = LoraSection(r=5, target_modules=targets)
    settings = recipe("train.precision=bf16").model_copy(
        update={"adapter": AdapterSection(kind="lora", lora=lora)}
    )
    found = memory.state_bytes(GROUPED, settings, accumulates=False)
    model = empty_decoder(GROUPED, torch.float32)
    add_lora(model, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["moments"] == 8 * trained
    assert found["weights"] == 2 * sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("mib", "kind", "reason"),
    [
        (1024, "none", "none 7 MiB; there is room for 714 MiB"),
        (11, "selective", "none 7 MiB, selective 4 MiB; there is room for 5 MiB"),
        (9, "full", "none 7 MiB, selective 4 MiB, full 2 MiB; there is room for 3 MiB"),
        (
            *(1, "full"),
            "none 7 MiB, selective 4 MiB, full 2 MiB; there is room for 0 MiB, so memory may run out",
        ),
    ],
)
def test_checkpointing_is_chosen_by_memory(mib: int, kind: str, reason: str) -> None:
    """The least that lets one row fit, with the figures that led to it."""
    found = resolved("train.steps=5", available_bytes=mib * 2**20)
    assert found.recipe.train.activation_checkpointing == kind
    told = found.reasons["train.activation_checkpointing"]
    assert told == f"activations of 1 row: {reason}"


def test_what_the_user_set_stays() -> None:
    found = resolved("train.activation_checkpointing=none", available_bytes=2**20)
    assert found.recipe.train.activation_checkpointing == "none"
    assert "train.activation_checkpointing" not in found.reasons
    found = resolved("train.micro_batch_rows=16", "train.step_rows=32", available_bytes=2**26)
    assert found.recipe.train.micro_batch_rows == 16
    assert "activations of 16 rows: none" in found.reasons["train.activation_checkpointing"]


def test_a_micro_batch_fits() -> None:
    """Beside state and loss, in the share of memory that is counted on."""
    found = resolved("train.step_rows=48", "train.steps=5", available_bytes=60 * 2**20)
    rows = found.recipe.train.micro_batch_rows
    assert isinstance(rows, int) and 1 < rows < 32
    reason = found.reasons["train.micro_batch_rows"]
    assert reason == "memory has room for 5 rows; divides the update evenly"
    train = found.recipe.train
    takes = 256 * rows * memory.activation_bytes_per_token(GROUPED, train, "none")
    assert takes <= memory.free_for_activations(GROUPED, found.recipe, 60 * 2**20)
    more = resolved("train.step_rows=48", "train.steps=5", available_bytes=2**32)
    assert more.recipe.train.micro_batch_rows == 24
    assert "8192 tokens keep the cores busy" in more.reasons["train.micro_batch_rows"]


def test_several_processes_share_the_rows_and_when_sharded_the_state() -> None:
    words = ("train.step_rows=48", "train.steps=5")
    assert resolved(*words, num_processes=4).recipe.train.micro_batch_rows == 12
    room = [
        memory.free_for_activations(GROUPED, resolved(*words).recipe, 2**26, shards)
        for shards in (1, 4)
    ]
    assert room[1] > room[0]


# ---------------------------------------------------------------- what is worth timing

LONG = Timing(run_rows=100_000, run_s=10_000, compile_s=0)


@pytest.mark.parametrize(
    ("step_rows", "least", "most", "expected"),
    [
        (512, 4, 1000, (4, 8, 16, 32, 64)),
        (512, 4, 20, (4, 8, 16)),
        (12, 1, 1000, (1, 2, 4, 6, 12)),
        (12, 1, 9, (1, 2, 4, 6)),
        (7, 1, 1000, (1, 7)),
        (7, 1, 6, ()),  # one size only: nothing to choose from
        (8, 30, 1000, ()),  # the whole update is small
        (8, 0, 1000, (1, 2, 4, 8)),
    ],
)
def test_sizes_double_and_divide_the_update(
    step_rows: int, least: int, most: int, expected: tuple[int, ...]
) -> None:
    assert candidates(step_rows, least, most, LONG) == expected


def test_timing_must_pay() -> None:
    """At most 5% of the run, and no run under ten minutes."""
    assert candidates(64, 1, 64, replace(LONG, run_s=599)) == ()
    costly = replace(LONG, compile_s=150)  # 500 s may be used: three sizes
    assert candidates(64, 1, 64, costly) == (1, 2, 4)
    assert candidates(64, 1, 64, replace(LONG, compile_s=251)) == ()
    assert candidates(64, 1, 64, replace(LONG, run_rows=1000, run_s=1000)) == (1, 2, 4, 8)


def test_a_larger_size_must_be_clearly_faster() -> None:
    assert fastest([(1, 100.0), (2, 110.0), (4, 112.0)]) == (
        2,
        "measured before the run: 100 tokens/s with 1 row, 110 with 2, 112 with 4",
    )
    assert fastest([(3, 1234.0)]) == (3, "measured before the run: 1,234 tokens/s with 3 rows")


def test_only_long_open_runs_have_candidates() -> None:
    words = ("train.steps=100000", "train.step_rows=64")
    assert resolved(*words).candidates == (4, 8, 16, 32, 64)
    assert resolved("train.steps=10", "train.step_rows=64").candidates == ()
    assert resolved(*words, "train.micro_batch_rows=4").candidates == ()
    sharded = resolved(*words, "train.sharding=full", num_processes=2, processes_per_machine=2)
    assert sharded.candidates == ()
    assert resolved(*words, available_bytes=100 * 2**20).candidates == (4, 8)
    found = resolved(*words).with_micro_batch(8, "because")
    assert found.recipe.train.micro_batch_rows == 8
    assert found.reasons["train.micro_batch_rows"] == "because"


def test_the_largest_even_part() -> None:
    assert [largest_even_part(12, most) for most in (0, 1, 5, 11, 12, 99)] == [1, 1, 4, 6, 12, 12]
