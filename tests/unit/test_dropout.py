"""Dropout of what the blocks add: only in training, as often as asked, and repeatable."""

from __future__ import annotations

import shutil

import pytest
import torch

from mule.config.load import load_recipe
from mule.models.decoder import Decoder
from mule.train.assemble import model_and_optimizer
from mule.train.optim import Optimizer
from mule.train.step import train_step
from tests.tiny import TINY, part, random_batch, tiny_model


def model_with(dropout: float) -> Decoder:
    model = tiny_model().train()
    model.set_training(dropout=dropout)
    return model


def nll(model: Decoder, seed: int) -> float:
    torch.manual_seed(seed)
    return float(model.nll_sum(random_batch(2, 9)).detach())


def test_zero_draws_no_random_number_and_changes_no_bit() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batch = random_batch(2, 9)
    assert torch.equal(model_with(0.0).nll_sum(batch), tiny_model().eval().nll_sum(batch))
    assert torch.equal(torch.get_rng_state(), before)


def test_only_in_training_mode() -> None:
    model = model_with(0.5)
    assert nll(model, 1) != nll(model, 2)
    assert nll(model.eval(), 1) == nll(model.eval(), 2) == nll(tiny_model().eval(), 3)


def test_the_share_of_both_halves_is_dropped_and_the_rest_scaled() -> None:
    """With the weights of one half at zero, the block adds the other half's dropped output only."""
    x = torch.randn(3, 50, TINY.hidden_size, generator=torch.Generator().manual_seed(2))
    angles = (torch.ones(1, 1, 50, 5), torch.zeros(1, 1, 50, 5))
    for silent, heard in (("self_attn.o_proj", "mlp"), ("mlp.down_proj", "self_attn")):
        block = model_with(0.25).model.layers[0]
        with torch.no_grad():
            block.get_submodule(silent).weight.zero_()
            added = block(x, angles, None) - x
            whole = block.eval()(x, angles, None) - x
        dropped = added.abs() < 1e-7
        assert 0.22 < dropped.float().mean() < 0.28, heard
        torch.testing.assert_close(added[~dropped], (whole / 0.75)[~dropped], atol=1e-5, rtol=1e-4)


def test_an_update_is_repeated_by_its_seeds() -> None:
    """Whatever was drawn before: each micro-batch sets its own seed."""
    batch = random_batch(4, 9)
    halves = [part(batch, slice(0, 2)), part(batch, slice(2, 4))]
    losses = []
    for noise, seeds in ((1, [7, 8]), (2, [7, 8]), (1, [8, 7])):
        model = model_with(0.4)
        optimizer = Optimizer(model, load_recipe(None, [], complete=False).recipe.optim)
        torch.manual_seed(noise)
        found = train_step(
            model, optimizer, halves, lr=1e-3, max_grad_norm=1.0, dropout_seeds=seeds
        )
        losses.append((found.loss, found.grad_norm))
    assert losses[0] == losses[1] != losses[2]


def test_the_recipe_says_how_much() -> None:
    words = ["train.dropout=0.125", "train.activation_checkpointing=full", "train.threads=1"]
    words += ["train.precision=fp32", "train.compile=false", "train.device=cpu"]
    recipe = load_recipe(None, words, complete=False).recipe
    model, _ = model_and_optimizer(recipe, TINY, None)
    assert [(b.dropout, b.recompute) for b in model.model.layers] == [(0.125, "full")] * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's look
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_it_follows_the_seed_too() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = model_with(0.5)
    model.compile_regions()
    first, other, again = (nll(model, seed) for seed in (1, 2, 1))
    assert first == again != other
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and not counters["recompiles"]
