"""The moving average of the weights: its closed form, its evaluation, its folder."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mule.adapters.identity import base_identity
from mule.adapters.lora import add_lora
from mule.adapters.source import find_source, load_source
from mule.config.adapter import LoraSection
from mule.config.schema import OptimSection, Recipe
from mule.models.decoder import Decoder
from mule.models.folder import load_model, save_model
from mule.tokenizer import Tokenizer
from mule.train.distributed import ALONE
from mule.train.ema import averaged_weights, save_ema
from mule.train.optim import Optimizer
from mule.train.step import NonFiniteStep, train_step
from tests.tiny import TINY, random_batch, tiny_model

CONFIG = dataclasses.replace(TINY, vocab_size=320)
DECAY = 0.7


def ema_of(model: Decoder, *, dtype: torch.dtype = torch.float32, kind: str = "adamw") -> Optimizer:
    section = OptimSection(kind=cast(Any, kind), ema_decay=DECAY)
    return Optimizer(model, section, dtype=dtype)


def train(model: Decoder, optimizer: Optimizer, steps: int = 4) -> list[dict[str, torch.Tensor]]:
    """The masters before the first update and after each."""
    states = [{name: t.clone() for name, t in optimizer.master_weights().items()}]
    for step in range(steps):
        batch = random_batch(2, 9, seed=step)
        train_step(model, optimizer, [batch], lr=0.01, max_grad_norm=1.0)
        states.append({name: t.clone() for name, t in optimizer.master_weights().items()})
    return states


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_it_is_the_exponentially_weighted_sum_of_the_masters(kind: str) -> None:
    model = tiny_model(CONFIG)
    optimizer = ema_of(model, dtype=torch.bfloat16, kind=kind)
    n = 4
    states = train(model, optimizer, n)
    averages = optimizer.ema_weights()
    assert averages.keys() == states[0].keys()
    for name, average in averages.items():
        expected = DECAY**n * states[0][name].double()
        for i in range(1, n + 1):
            expected += (1 - DECAY) * DECAY ** (n - i) * states[i][name].double()
        torch.testing.assert_close(average.double(), expected, atol=1e-7, rtol=1e-6, msg=name)
        assert not torch.equal(average, states[n][name])
        assert optimizer.moments()[f"ema.{name}"].data_ptr() == average.data_ptr()


def test_it_changes_nothing_of_the_training() -> None:
    states = []
    for decay in (None, DECAY):
        model = tiny_model(CONFIG)
        optimizer = Optimizer(model, OptimSection(ema_decay=decay))
        states.append(train(model, optimizer)[-1])
        assert bool(optimizer.ema_weights()) is (decay is not None)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_refused_update_does_not_count() -> None:
    model = tiny_model(CONFIG)
    optimizer = ema_of(model)
    train(model, optimizer)
    before = {name: t.clone() for name, t in optimizer.ema_weights().items()}
    model.model.norm.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(NonFiniteStep):
        train(model, optimizer, 1)
    assert all(torch.equal(t, before[name]) for name, t in optimizer.ema_weights().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_with_it_gives_the_old_bits_back(dtype: torch.dtype, fails: bool) -> None:
    model = tiny_model(CONFIG)
    optimizer = ema_of(model, dtype=dtype)
    train(model, optimizer)
    digest = optimizer.digest()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reference = tiny_model(CONFIG)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(optimizer.ema_weights()[name].to(dtype))
    try:
        with averaged_weights(model, optimizer):
            found = loss_of(model)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert found == loss_of(reference.to(dtype)) != loss_of(model)
    for name, p in model.named_parameters():
        assert p.dtype == dtype and torch.equal(p, before[name]), name
    assert optimizer.digest() == digest
    # The parameters are still what the optimizer updates.
    train(model, optimizer, 1)
    assert not torch.equal(model.model.norm.weight, before["model.norm.weight"])


def loss_of(model: Decoder) -> float:
    with torch.no_grad():
        return float(model.nll_sum(random_batch(3, 9, seed=8)))


def parts_of(
    model: Decoder, optimizer: Optimizer, recipe: Recipe, base: tuple[Path, dict[str, str | None]]
) -> Any:
    tokenizer = Tokenizer.train(["The capital of France is Paris, of Spain Madrid.\n" * 9], 300)
    return SimpleNamespace(
        model=model,
        config=model.config,
        optimizer=optimizer,
        recipe=recipe,
        tokenizer=tokenizer,
        base=base,
        group=ALONE,
        is_sharded=False,
    )


def test_its_folder_is_a_model(tmp_path: Path) -> None:
    model = tiny_model(CONFIG)
    optimizer = ema_of(model, dtype=torch.bfloat16)
    parts = parts_of(model, optimizer, Recipe(), (Path(), {}))
    for _ in range(2):  # the second replaces the first
        train(model, optimizer)
        save_ema(tmp_path / "run" / "ema", parts)
    source = find_source(str(tmp_path / "run" / "ema"))
    loaded, tokenizer = load_source(source)
    assert tokenizer.fingerprint() == parts.tokenizer.fingerprint()
    averages = optimizer.ema_weights()
    for name, p in loaded.named_parameters():
        assert torch.equal(p, averages[name]), name


def test_its_folder_is_an_adapter_when_one_is_trained(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_model(_untied(tiny_model(CONFIG)), CONFIG, base)
    model = load_model(base)
    lora = LoraSection(r=3)
    add_lora(model, lora, seed=1)
    optimizer = ema_of(model.train())
    train(model, optimizer)
    recipe = Recipe.model_validate({"adapter": {"kind": "lora", "lora": {"r": 3}}})
    save_ema(tmp_path / "ema", parts_of(model, optimizer, recipe, (base, base_identity(base))))
    loaded, _ = load_source(find_source(str(tmp_path / "ema")))
    averages = optimizer.ema_weights()
    found = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert found.keys() == averages.keys() and found
    assert all(torch.equal(p, averages[name]) for name, p in found.items())


def _untied(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
