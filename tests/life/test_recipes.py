"""The recipes that come with Mule: each is run, made small, by the commands in its own header."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from mule.commands import init, recipes
from mule.config.load import load_recipe
from mule.config.presets import MODELS, catalogue_file, presets
from mule.config.schema import OptimSection
from mule.errors import ConfigError
from mule.models import cost
from mule.models.decoder import empty_decoder
from mule.plan.catalogue import entries
from mule.plan.shape import new_model_config
from mule.run import Run
from mule.train.optim import Optimizer
from tests.life.tiny_life import Forker, write_data
from tests.tiny_folder import write_tiny_folder

PRETRAIN = {"pretrain-25m": 25.7e6, "pretrain-124m": 123.6e6, "pretrain-350m": 349.2e6}
CATALOGUE = {entry.name: entry for entry in entries(catalogue_file(MODELS) or Path())}
OURS = (*PRETRAIN, "sft-112m-mix")
# What makes a recipe small: the model, its rows and its updates; all else stays as written.
ANY = ("data.max_seq_length=96", "train.compile=false", "train.threads=1", "train.precision=fp32")
SMALL = (
    *("model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.head_dim=16", "model.intermediate_size=48", "model.max_position_embeddings=128"),
    *("tokenizer.vocab_size=320", "train.tokens=1800", "train.step_tokens=480"),
    *("optim.warmup_steps=1", "data.valid_share=0.1"),
)
SHORT = ("train.steps=3", "train.step_examples=6", "optim.warmup_steps=1", "evaluate.every_steps=2")


def write_sources(folder: Path) -> None:
    """Texts in corpus/, and Alpaca, GSM8K and Dolly in their own formats, as a user has them."""
    write_data(folder)
    (folder / "corpus").mkdir()
    (folder / "text.txt").rename(folder / "corpus" / "text.txt")
    (folder / "gsm8k").mkdir()
    draw = random.Random(1)

    def words() -> str:
        return " ".join(str(draw.randrange(10**6)) for _ in range(4))

    alpaca = [{"instruction": words(), "input": "", "output": words()} for _ in range(30)]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    sums = [{"question": words(), "answer": f"{words()}\n#### {n}"} for n in range(40)]
    _write(folder / "gsm8k" / "train.jsonl", sums[:30])
    _write(folder / "gsm8k" / "test.jsonl", sums[30:])
    names = ("instruction", "context", "response", "category")
    _write(folder / "dolly.jsonl", [{name: words() for name in names} for _ in range(30)])


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def header_commands(name: str) -> list[list[str]]:
    """The words after `mule` of each command in the recipe's header."""
    lines = presets()[name].read_text().splitlines()
    found = [line.removeprefix("#   mule ") for line in lines if line.startswith("#   mule ")]
    return [shlex.split(line) for line in found]


@pytest.mark.parametrize("name", PRETRAIN)
def test_a_pretraining_recipe_runs(forker: Forker, tmp_path: Path, name: str) -> None:
    write_sources(tmp_path)
    (words,) = header_commands(name)
    code = forker.run(tmp_path, *words, *SMALL, *ANY)
    assert code == 0, (tmp_path / "output.log").read_text()
    run = Run.open(tmp_path / "runs" / name)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    assert run.checkpoints()[-1][0] == 4
    assert {len(row["answers"]) for row in run.samples()} == {2}


def test_the_mix_recipe_runs(forker: Forker, tmp_path: Path) -> None:
    """All the commands of its header, in order."""
    write_sources(tmp_path)
    base, mix, sft = header_commands("sft-112m-mix")
    assert base[-1] == "tokenizer.vocab_size=35200"
    for words in ((*base[:-1], *SMALL, *ANY), mix, (*sft, *SHORT, *ANY)):
        code = forker.run(tmp_path, *words)
        assert code == 0, (tmp_path / "output.log").read_text()
    card = json.loads((tmp_path / "sft-mix" / "mix.json").read_text())
    assert [source["name"] for source in card["sources"]] == ["alpaca", "gsm8k", "dolly"]
    rows = Run.open(tmp_path / "runs" / "sft-112m-mix").metrics()
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 3]
    assert rows[0]["learning_rate"] == pytest.approx(7e-5)
    assert rows[-1]["learning_rate"] < 7e-5


@pytest.mark.parametrize("name", PRETRAIN)
def test_a_model_has_the_size_of_its_name(name: str) -> None:
    recipe = load_recipe(presets()[name], []).recipe
    config = new_model_config(recipe, recipe.tokenizer.vocab_size or 0)
    assert cost.total_params(config) == pytest.approx(PRETRAIN[name], rel=2e-3)


def test_the_base_of_the_mix_has_112_million_parameters() -> None:
    (words, *_) = header_commands("sft-112m-mix")
    recipe = load_recipe(presets()[words[1]], words[-1:]).recipe
    config = new_model_config(recipe, recipe.tokenizer.vocab_size or 0)
    assert cost.total_params(config) == pytest.approx(112e6, rel=2e-3)


def test_the_mix_recipe_says_what_was_asked_for() -> None:
    recipe = load_recipe(presets()["sft-112m-mix"], []).recipe
    optim, train = recipe.optim, recipe.train
    assert (optim.learning_rate, optim.min_learning_rate) == (7e-5, 1e-5)
    assert (optim.weight_decay, optim.warmup_steps, optim.max_grad_norm) == (0.05, 10, 1.0)
    assert (train.steps, train.step_examples, recipe.evaluate.every_steps) == (100, 16 * 16, 10)


def test_they_are_listed_with_what_they_do() -> None:
    found = recipes.list_recipes()
    listed = {row["name"]: row["about"] for row in [*found["recipes"], *found["catalogue"]]}
    assert {*OURS, *CATALOGUE, "donkeytune"} <= set(listed)
    for name in (*OURS, *CATALOGUE, "donkeytune"):
        assert len(listed[name]) > 20 and listed[name].endswith("."), name
        assert recipes.show(name)["next"] == f"mule train {name}"


def test_decay_acts_on_matrices_only() -> None:
    """Without a gradient an update is the decay alone."""
    decay = load_recipe(presets()["sft-112m-mix"], []).recipe.optim.weight_decay
    recipe = load_recipe(presets()["pretrain-25m"], [*SMALL, *ANY]).recipe
    model = empty_decoder(new_model_config(recipe, 320), torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    optimizer = Optimizer(model, OptimSection(weight_decay=decay))
    optimizer.step(lr=0.1)
    kinds = set()
    for name, weight in optimizer.master_weights().items():
        kept = weight.dim() == 1 or "embed_tokens" in name
        expected = 1.0 if kept else 1 - 0.1 * 0.05
        assert torch.allclose(weight, torch.full_like(weight, expected)), name
        kinds.add((kept, weight.dim()))
    assert kinds == {(True, 1), (True, 2), (False, 2)}


# ---------------------------------------------------------------- the catalogue

TINY_RUN = (*SHORT[:1], "evaluate.every_steps=3", *ANY[1:], "data.max_seq_length=256")


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats in data/, as `mule init` leaves it, and no model."""
    folder = tmp_path_factory.mktemp("catalogue")
    init.run(folder)
    return folder


QUICK = ("qwen2.5-0.5b", "gemma-3-270m")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in CATALOGUE]
)
def test_a_recipe_of_the_catalogue_runs(forker: Forker, newcomer: Path, name: str) -> None:
    """The command of its header, on a tiny model of the same family, where the model would be."""
    (words,) = header_commands(name)
    recipe = load_recipe(presets()[name]).recipe
    assert recipe.model.path is not None
    folder = newcomer / recipe.model.path
    if not folder.is_dir():
        write_tiny_folder(folder, CATALOGUE[name].raw)
    alone = words[: words.index("--launch")] if "--launch" in words else words
    code = forker.run(newcomer, *alone, *TINY_RUN)
    assert code == 0, (newcomer / "output.log").read_text()
    run = Run.open(newcomer / "runs" / name)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    adapted = load_recipe(run.folder / "resolved.yaml").recipe.adapter
    assert (adapted.kind, adapted.lora.last_layers) == (
        recipe.adapter.kind,
        recipe.adapter.lora.last_layers,
    )
    if alone != words:
        code = forker.run(newcomer, *words)
        log = (newcomer / "output.log").read_text()
        assert code == 0 and "torchrun --standalone --nproc-per-node 4" in log


@pytest.mark.slow
def test_donkeytune_runs_as_its_header_says(forker: Forker, newcomer: Path) -> None:
    (words,) = header_commands("donkeytune")
    model = newcomer / words[words.index("--model") + 1]
    if not model.is_dir():
        write_tiny_folder(model, CATALOGUE["qwen2.5-1.5b"].raw)
    small = ("train.steps=101", "data.max_seq_length=256", *ANY[1:], "train.step_examples=2")
    code = forker.run(newcomer, *words, *small)
    assert code == 0, (newcomer / "output.log").read_text()
    run = Run.open(newcomer / "runs" / "donkeytune")
    rows = run.metrics()
    assert {row["learning_rate"] for row in rows} == {1e-5}
    assert [row["step"] for row in rows if "val_loss" in row] == [50, 100, 101]
    assert [step for step, _ in run.checkpoints()][-1] == 101


def test_donkeytune_has_its_settings() -> None:
    """Its Makefile and fine-tune.sh at 3d6d40e, with mlx-lm's own defaults where they say nothing."""
    recipe = load_recipe(presets()["donkeytune"], ["model.path=m", "data.train=d"]).recipe
    lora, train, optim = recipe.adapter.lora, recipe.train, recipe.optim
    assert (train.steps, train.step_examples, recipe.data.packing) == (600, 4, False)
    assert (lora.r, lora.last_layers, lora.dropout) == (8, 8, 0.05)
    assert lora.alpha / lora.r == 10, "its scale; its alpha was not read"
    assert (optim.learning_rate, optim.schedule, optim.weight_decay) == (1e-5, "constant", 0)
    assert (recipe.evaluate.every_steps, recipe.checkpoint.every_steps) == (50, 100)
    assert recipe.data.max_seq_length == 2048
    with pytest.raises(ConfigError, match="model is missing"):
        load_recipe(presets()["donkeytune"])
