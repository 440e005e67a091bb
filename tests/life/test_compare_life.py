"""Comparisons of runs that were really trained, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from mule.commands import compare
from mule.compare.normalise import from_recipe, from_run
from mule.run import Run
from tests.life.tiny_life import Forker, write_data


@pytest.fixture(scope="module")
def folder(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in their learning rate."""
    folder = tmp_path_factory.mktemp("compare")
    write_data(folder)
    for name, rate in (("fast", "0.01"), ("slow", "0.0001")):
        words = ("train.steps=10", f"optim.learning_rate={rate}", "--name", name)
        assert forker.run(folder, "train", "pretrain.yaml", *words) == 0
    return folder


def test_a_recipe_says_what_its_run_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be told before the run is what the run has, and the run tells more."""
    monkeypatch.chdir(folder)
    before = from_recipe("pretrain.yaml", ["train.steps=10", "optim.learning_rate=0.01"])
    run = Run.open("fast")
    after = from_run(run)
    for key, value in before.values.items():
        if key != "vocab_size":  # the tokenizer may find fewer tokens than it was asked for
            assert after.get(key) == value.value or key in (
                "trained_tokens",
                "tokens_per_parameter",
            )
    with safe_open(run.checkpoints()[-1][1] / "model.safetensors", "np") as tensors:
        counted = sum(tensors.get_tensor(name).size for name in tensors.keys())
    assert after.get("parameters") == counted == before.get("parameters")
    assert {"initial_loss", "final_loss", "hours", "hardware", "epochs"} <= after.values.keys()
    rows = {row["key"]: row for row in compare.run(["fast"])["rows"]}
    assert rows["initial_loss"]["verdict"] == "near"  # a new model begins at ln(vocabulary)


def test_runs_beside_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = compare.run(["fast", "slow"], out=[Path("two.html")])
    assert [row["key"] for row in found["differs"]] == ["optim.learning_rate"]
    (difference,) = found["significance"]["differences"]
    assert difference["seeds"] == [3] and difference["mean"] > 0.1  # the slow one hardly learned
    assert Path("two.html").read_text().count("<svg") == 2
    again = compare.run(["fast", "fast"])
    assert not again["differs"] and not again["significance"]["differences"]


def test_the_command_line(folder: Path, forker: Forker) -> None:
    assert forker.run(folder, "compare", "pretrain.yaml", "train.steps=20", "--out", "a.md") == 0
    assert "Nearest published" in (folder / "a.md").read_text()
    assert forker.run(folder, "runs", "compare", "fast", "slow", "--json") == 0
    assert forker.run(folder, "compare", "nothing-of-that-name") == 2
