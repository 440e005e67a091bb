"""train.freeze: what is left out of training, and that it stays as it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from mule import fsio
from mule.adapters.start import Start
from mule.config.load import load_recipe
from mule.errors import ConfigError
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.models.folder import load_model, model_state
from mule.plan import memory
from mule.tokenizer import Tokenizer
from mule.train.assemble import Parts
from mule.train.checkpoint import checkpoint_bytes, write_model
from mule.train.distributed import ALONE
from mule.train.model import freeze, make_model
from mule.train.optim import Optimizer
from mule.train.step import train_step
from tests.merge_case import CONFIG, save_base
from tests.tiny import TINY, random_batch, tiny_model

PATTERNS = ["model.embed_tokens.*", "model.layers.0.*", "*norm*"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


def frozen_names(model: Decoder) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_frozen_stays_and_the_rest_learns(
    base: Path, tmp_path: Path, precision: str
) -> None:
    """In bf16 too the saved weights are the base's bits, which bf16 cannot hold."""
    words = [
        f"train.freeze=[{', '.join(repr(p) for p in PATTERNS)}]",
        f"train.precision={precision}",
    ]
    words += ["data.train=[a.txt]", f"model.path={base}", "train.activation_checkpointing=none"]
    recipe = load_recipe(None, words).recipe
    model = make_model(recipe, CONFIG, Start(base), ALONE)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    optimizer = Optimizer(model, recipe.optim, dtype=dtype)
    names = frozen_names(model)
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= names
    assert {p.dtype for p in model.parameters()} == {dtype}
    batch = random_batch(3, 9)
    losses = [
        train_step(model, optimizer, [batch], lr=0.01, max_grad_norm=1.0).loss for _ in range(9)
    ]
    assert losses[-1] < losses[0]
    parts = SimpleNamespace(
        recipe=recipe,
        model=model,
        config=model.config,
        optimizer=optimizer,
        group=ALONE,
        is_sharded=False,
        base=(base, {}),
        tokenizer=Tokenizer.load(base),
    )
    with fsio.atomic_folder(tmp_path / "saved") as out:
        write_model(optimizer.master_weights(), cast(Parts, parts), out)
    before = model_state(load_model(base))
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name]) is (name in names), name
    written = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert checkpoint_bytes(cast(Parts, parts)) > written


def test_nothing_flows_below_what_is_frozen_from_the_bottom() -> None:
    model = tiny_model().train()
    freeze(model, ["model.embed_tokens.*", "model.layers.0.*"], torch.float32)
    # the embedding is the head too, and is frozen there as well
    model.nll_sum(random_batch(2, 9)).backward()
    grads = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {"1", "2", "weight"}


REFUSED = [
    (
        ["model.layer.0.*"],
        "train.freeze = model.layer.0.* matches no weight; did you mean model.layers.0.*?",
    ),
    (
        ["model.norm.weight", "model.embed_token.weight"],
        "train.freeze = model.embed_token.weight matches no weight; did you mean "
        "model.embed_tokens.weight?",
    ),
    (["lm_head.*"], "the head of this model is its embedding (tied)"),
    (["*"], "train.freeze = [*] leaves nothing to train"),
]


@pytest.mark.parametrize(("patterns", "message"), REFUSED)
def test_a_pattern_that_cannot_be_meant(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        freeze(tiny_model(), patterns, torch.float32)
    assert message in caught.value.message
    hints = ("names are those of model.safetensors", "name the embedding: ", "remove a pattern; or")
    assert caught.value.hint.startswith(hints)


@pytest.mark.parametrize("config", [TINY, CONFIG])
def test_the_plan_knows_what_is_frozen(config: ModelConfig) -> None:
    words: list[Any] = ["data.train=[a.txt]", "model.size=2m", "train.precision=bf16"]
    recipe = load_recipe(None, [*words, "train.freeze=['model.embed_tokens.*', '*.mlp.*']"]).recipe
    model = tiny_model(config)
    freeze(model, list(recipe.train.freeze), torch.bfloat16)
    found = memory.state_bytes(config, recipe, accumulates=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found["masters"], found["moments"]) == (4 * trained, 8 * trained)
    assert found["weights"] == 2 * sum(p.numel() for p in model.parameters())
