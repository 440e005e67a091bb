"""Every "auto" is decided with its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.errors import ConfigError
from mule.models.config import ModelConfig
from mule.plan.resolve import Facts, Resolved, resolve
from mule.plan.shape import new_model_config

TINY = ModelConfig(
    family="llama",
    vocab_size=89,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    intermediate_size=40,
)
FACTS = Facts(
    num_rows=1000,
    row_length=256,
    targets_per_row=200.0,
    examples_per_row=3.5,
    cpu_cores=6,
    fast_bf16=True,
    cpp_compiler=True,
    available_bytes=16 * 2**30,
    matmul_peak_flops=1e12,
)


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["data.train=[a.txt]", "model.size=2m", *overrides]).recipe


def resolved(*overrides: str, **facts: Any) -> Resolved:
    return resolve(recipe(*overrides), TINY, dataclasses.replace(FACTS, **facts))


@pytest.mark.parametrize(
    ("facts", "key", "value", "reason"),
    [
        ({}, "device", "cpu", "no GPU found"),
        ({"cuda": True}, "device", "cuda", "a CUDA device is present"),
        ({"mps": True}, "device", "mps", "an Apple GPU is present"),
        ({}, "threads", 6, "6 physical cores"),
        ({}, "precision", "bf16", "this CPU has bf16 instructions (avx512_bf16 or amx_bf16)"),
        ({"fast_bf16": False}, "precision", "fp32", "this CPU has no bf16 instructions"),
        (
            {"cuda": True, "fast_bf16": False},
            "precision",
            "bf16",
            "GPUs compute bf16 several times faster than fp32",
        ),
        ({"cpp_compiler": False}, "compile", False, "no C++ compiler found"),
        ({}, "steps", 31, "1 epochs of 31.2 updates"),
    ],
)
def test_reasons(facts: dict[str, Any], key: str, value: Any, reason: str) -> None:
    found = resolved(**facts)
    assert getattr(found.recipe.train, key) == value
    assert found.reasons[f"train.{key}"] == reason


def test_what_the_user_set_is_kept_without_a_reason() -> None:
    found = resolved("train.precision=fp32", "train.threads=3", "train.compile=false", cuda=False)
    assert (found.recipe.train.precision, found.recipe.train.threads) == ("fp32", 3)
    assert not {"train.precision", "train.threads", "train.compile"} & set(found.reasons)


@pytest.mark.parametrize(
    ("override", "rows", "reason"),
    [
        ("train.seed=1", 32, "about 8,192 tokens an update"),
        ("train.step_tokens=1300", 5, "1300 tokens / 256 a row"),
        ("train.step_examples=21", 6, "21 examples / 3.50 a packed row"),
        ("train.step_tokens=1024000", 1000, "capped at the 1000 rows there are"),
    ],
)
def test_rows_of_an_update(override: str, rows: int, reason: str) -> None:
    found = resolved(override)
    assert found.step_rows == rows
    assert reason in found.reasons["train.step_rows"]


def test_an_update_below_one_row_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        resolved("train.step_tokens=200")
    assert caught.value.problems == ["train.step_tokens = 200 is less than one row of 256 tokens"]
    assert caught.value.hint == "raise train.step_tokens, or lower data.max_seq_length"


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["train.steps=77"], 77),
        (["train.epochs=2.5", "train.step_rows=10"], 250),
        (["train.tokens=100000", "train.step_rows=10"], 50),
    ],
)
def test_length(overrides: list[str], steps: int) -> None:
    assert resolved(*overrides).num_steps == steps


def test_warm_up_must_end_before_the_run() -> None:
    with pytest.raises(ConfigError) as caught:
        resolved("train.steps=9", "optim.warmup_steps=9")
    assert caught.value.problems == ["optim.warmup_steps = 9 is not below the 9 updates"]
    assert resolved("train.steps=9", "optim.warmup_steps=8").recipe.optim.warmup_steps == 8
    assert resolved("train.steps=100").recipe.optim.warmup_steps == 5
    assert resolved("train.steps=100000").recipe.optim.warmup_steps == 500


def test_one_update_needs_no_warm_up() -> None:
    """The shortest run there is must be possible with everything on auto."""
    found = resolved("train.steps=1")
    assert (found.num_steps, found.recipe.optim.warmup_steps) == (1, 0)


@pytest.mark.parametrize("step_rows", [1, 7, 32, 33, 60, 97, 480])
@pytest.mark.parametrize("memory_mib", [2, 64, 16384])
def test_a_micro_batch_divides_the_update(step_rows: int, memory_mib: int) -> None:
    found = resolved(f"train.step_rows={step_rows}", available_bytes=memory_mib * 2**20)
    rows = found.recipe.train.micro_batch_rows
    assert isinstance(rows, int) and step_rows % rows == 0
    assert rows * 256 <= 8192
    reason = found.reasons["train.micro_batch_rows"]
    assert reason.startswith("memory") == (memory_mib == 2)


def test_compiling_must_pay() -> None:
    short, long = resolved("train.steps=10"), resolved("train.steps=10000000")
    assert short.recipe.train.compile is False and long.recipe.train.compile is True
    assert "less than the" in short.reasons["train.compile"]
    assert "more than the" in long.reasons["train.compile"]
    assert resolved("train.steps=10", "train.compile=true").recipe.train.compile is True


def test_a_device_that_is_not_there_is_refused() -> None:
    for device in ("cuda", "mps"):
        with pytest.raises(ConfigError) as caught:
            resolved(f"train.device={device}")
        assert caught.value.problems == [f"train.device = {device}, but this machine has none"]
        assert caught.value.hint == "set train.device to auto or cpu"


def test_cadences() -> None:
    found = resolved("train.steps=100").recipe
    assert (found.evaluate.every_steps, found.checkpoint.every_steps) == (5, 10)
    found = resolved("train.steps=2", "optim.warmup_steps=1", "checkpoint.every_steps=2").recipe
    assert (found.evaluate.every_steps, found.checkpoint.every_steps) == (1, 2)


def test_a_resolved_recipe_resolves_to_itself() -> None:
    found = resolved("train.steps=100")
    again = resolve(found.recipe, TINY, FACTS)
    assert again.recipe == found.recipe and not again.reasons


def test_shape_of_a_new_model() -> None:
    config = new_model_config(recipe("model.num_layers=3"), 300)
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (256, 3, 320)
    whole = recipe()
    shapeless = whole.model_copy(update={"model": whole.model.model_copy(update={"size": None})})
    with pytest.raises(ConfigError, match="the model has no shape"):
        new_model_config(shapeless, 300)
    with pytest.raises(ConfigError, match="below the tokenizer's 300 tokens"):
        new_model_config(recipe("model.vocab_size=299"), 300)
