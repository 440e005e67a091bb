"""Whole runs of `mule train` on a CUDA card, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mule.run import Run
from tests.gpu.marks import NEEDS_CUDA
from tests.life.tiny_life import REPOSITORY, outcome, write_data

pytestmark = NEEDS_CUDA
DEVICE = "cuda"
MULE = "from mule.cli.main import main; main()"
# Flash attention's backward pass adds in any order unless it is told not to.
DETERMINISTIC = "import torch; torch.use_deterministic_algorithms(True); "
# Dimensions that 16 divides; enough activations for memory to run out below.
WIDE = {
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "intermediate_size": 320,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def _start(folder: Path, words: list[str], before: str = "") -> subprocess.Popen[str]:
    environment = os.environ | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS asks for it where it must be deterministic
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "XDG_CACHE_HOME": str(folder.parent / "cache"),
    }
    return subprocess.Popen(
        [sys.executable, "-c", before + MULE, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _train(folder: Path, *words: str, before: str = "") -> Run:
    """A run that must succeed."""
    command = ["train", "pretrain.yaml", f"train.device={DEVICE}", *words]
    process = _start(folder, command, before)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said[-3000:]
    names = [word.partition("=")[2] for word in words if word.startswith("name=")]
    return Run.open(folder / "runs" / (names[0] if names else "pretrain"))


def _wide(*words: str) -> list[str]:
    return [*(f"model.{key}={value}" for key, value in WIDE.items()), *words]


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
def test_a_run_learns_and_records_its_memory(folder: Path, precision: str) -> None:
    run = _train(folder, f"train.precision={precision}", "train.compile=false")
    rows = run.metrics()
    assert rows[-1]["step"] == 30 and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    total = torch.cuda.get_device_properties(0).total_memory if DEVICE == "cuda" else 2**50
    (device,) = rows[-1]["devices"]
    assert device["device"] == DEVICE
    if DEVICE == "cuda":
        allocated, reserved = device["peak_allocated_bytes"], device["peak_reserved_bytes"]
        assert 0 < allocated <= device["peak_active_bytes"] <= reserved <= total
        assert rows[-1]["memory_bytes"] == allocated


def test_a_compiled_run_learns_what_an_eager_one_does(folder: Path) -> None:
    eager, compiled = (
        _train(folder, *_wide("train.precision=bf16", f"train.compile={flag}", f"name={flag}"))
        for flag in ("false", "true")
    )
    last = [run.metrics()[-1]["loss"] for run in (eager, compiled)]
    assert last[1] == pytest.approx(last[0], rel=3e-2)


def test_a_run_in_float8(folder: Path) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 products need compute capability 8.9 (Ada, Hopper)")
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    run = _train(folder, *_wide("train.precision=fp8", "train.compile=true"))
    rows = run.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_killed_run_goes_on_bit_identically(folder: Path, precision: str) -> None:
    settings = [
        *(f"train.precision={precision}", "train.steps=120", "checkpoint.every_steps=10"),
        *("optim.warmup_steps=5", "evaluate.every_steps=30"),
    ]
    whole = _train(folder, *settings, "name=whole", before=DETERMINISTIC)
    words = ["train", "pretrain.yaml", f"train.device={DEVICE}", *settings, "name=killed"]
    process = _start(folder, words, DETERMINISTIC)
    _wait_for(folder / "runs" / "killed" / "latest.json", process)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = folder / "runs" / "killed"
    assert process.returncode == -signal.SIGKILL, "it had ended before it could be killed"
    process = _start(folder, ["train", str(killed / "recipe.yaml"), "--resume"], DETERMINISTIC)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said[-3000:]
    assert len([e for e in Run.open(killed).events() if e["kind"] == "started"]) == 2
    assert outcome(killed) == outcome(whole.folder)


def test_memory_that_runs_out_halves_the_micro_batch(folder: Path) -> None:
    """The card's own allocator refuses, at a limit that a quarter of the rows keeps to."""
    (folder / "text.txt").write_text((folder / "text.txt").read_text() * 40)
    settings = _wide(
        *("data.max_seq_length=512", "model.max_position_embeddings=512", "train.step_rows=64"),
        *("train.steps=4", "optim.warmup_steps=1", "train.activation_checkpointing=none"),
    )
    whole = _train(folder, *settings, "train.micro_batch_rows=4", "name=small")
    limit = (
        "import torch; total = torch.cuda.get_device_properties(0).total_memory; "
        "torch.cuda.set_per_process_memory_fraction(400 * 2**20 / total); "
    )
    run = _train(folder, *settings, "train.micro_batch_rows=64", "name=limited", before=limit)
    halved = [event for event in run.events() if event["kind"] == "micro-batch halved"]
    assert halved and (halved[0]["step"], halved[0]["rows_before"], halved[0]["rows"]) == (
        1,
        64,
        32,
    )
    assert [row["num_targets"] for row in run.metrics()] == [
        row["num_targets"] for row in whole.metrics()
    ]
    for got, expected in zip(run.metrics(), whole.metrics(), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=2e-3)


def test_two_cards_learn_what_one_does(folder: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA cards")
    settings = ["train.precision=fp32", "train.device=cuda", "checkpoint.every_steps=30"]
    one = _train(folder, *settings[:1], "name=one", "checkpoint.every_steps=30")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "mule.cli.main", "train", "pretrain.yaml", *settings, "name=two"]
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        command, cwd=folder, check=True, timeout=300, env=os.environ | {"PYTHONPATH": paths}
    )
    losses = [
        [row["loss"] for row in run.metrics()[:20]] for run in (one, Run.open(folder / "runs/two"))
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def _wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    give_up_at = time.monotonic() + 120
    while not file.is_file():
        assert process.poll() is None and time.monotonic() < give_up_at
        time.sleep(0.02)
