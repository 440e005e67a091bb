"""A LoRA run computed by mlx-lm: the recipe, rows, log, checkpoints and adapter of a run on torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mule.run import Run
from tests.life.tiny_life import CHAT_RECIPE, LORA, REPOSITORY, outcome, write_data

pytest.importorskip("mlx_lm", reason="the extra mlx is not installed")
pytestmark = pytest.mark.slow  # four runs; tests/unit/test_mlx.py is quicker

ENGINE = ("adapter.engine=mlx", "adapter.lora.dropout=0")
TORCH = ("data.packing=false", "adapter.lora.dropout=0", "adapter.trunk_cache=off")


def mule(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`mule <words>` in `folder`, in a process of its own: mlx does not live through a fork."""
    return subprocess.run(
        [sys.executable, "-m", "mule.cli.main", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(machine_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of a few updates, and an adapter trained on it by torch and by mlx."""
    folder = tmp_path_factory.mktemp("mlx")
    write_data(folder)
    made = mule(folder, "train", "pretrain.yaml", "train.steps=4")
    assert made.returncode == 0, made.stderr
    recipe = CHAT_RECIPE.replace("BASE", "runs/pretrain") + LORA
    (folder / "lora.yaml").write_text(recipe)
    for name, words in (("torch", TORCH), ("mlx", ENGINE)):
        done = mule(folder, "train", "lora.yaml", "--name", name, *words)
        assert done.returncode == 0, done.stderr
    return folder


def test_the_run_is_that_of_torch(folder: Path) -> None:
    ours, theirs = (Run.open(folder / "runs" / name).metrics() for name in ("mlx", "torch"))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, twin in zip(ours, theirs, strict=True):
        assert row["num_targets"] == twin["num_targets"]
        assert row["learning_rate"] == twin["learning_rate"]
        for key in ("loss", "val_loss", "grad_norm"):
            assert row.get(key) == pytest.approx(twin.get(key), rel=2e-3, abs=2e-3)
    resolved = (folder / "runs" / "mlx" / "resolved.yaml").read_text()
    assert "packing: false" in resolved and "engine: mlx" in resolved
    assert "mlx computes the rest on its own device" in resolved


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_bits(folder: Path) -> None:
    words = ("train", "lora.yaml", "--name", "cut", *ENGINE)
    process = subprocess.Popen(
        [sys.executable, "-m", "mule.cli.main", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    run = folder / "runs" / "cut"
    while not (run / "latest.json").is_file() and process.poll() is None:
        pass
    process.kill()
    process.wait()
    resumed = mule(folder, *words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(run) == outcome(folder / "runs" / "mlx")


def test_its_adapter_merges_into_a_model_that_mlx_opens(folder: Path) -> None:
    merged = mule(folder, "merge", "runs/mlx", "--out", "merged")
    assert merged.returncode == 0, merged.stderr
    import mlx.core as mx
    import torch
    from mlx_lm.utils import load_model

    from mule.models.folder import load_model as load_ours

    model, _ = load_model(folder / "merged")
    found = torch.tensor(model(mx.array([[5, 6, 7, 8]])).astype(mx.float32).tolist())
    with torch.no_grad():
        wanted = load_ours(folder / "merged")(torch.tensor([[5, 6, 7, 8]]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_chat_says_what_torch_says(folder: Path) -> None:
    asked = ("chat", "runs/mlx", "--prompt", "the cat", "--temperature", "0", "--json")
    asked += ("--max-tokens", "8")
    told = [mule(folder, *asked, *more) for more in ((), ("--mlx",))]
    texts = [json.loads(done.stdout.splitlines()[-1])["text"] for done in told]
    assert texts[0] == texts[1] and texts[0]
