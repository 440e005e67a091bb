"""A run that is killed goes on to the very same bits. Real processes, real signals."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mule.run import Run
from tests.life.tiny_life import CHAT_RECIPE, LORA, Forker, kill, outcome, write_data

TRAIN = ("train", "pretrain.yaml")
FIRST_OF_4 = [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 3))]
GO_ON = ("train", "pretrain.yaml", "--resume")


@pytest.fixture(scope="module")
def reference(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that nothing interrupted: its outcome, its length in time and in durable calls."""
    folder = tmp_path_factory.mktemp("reference")
    write_data(folder)
    started_at = time.perf_counter()
    code = forker.run(folder, *TRAIN)
    assert code == 0, (folder / "output.log").read_text()
    return {
        "folder": folder,
        "run": folder / "runs" / "pretrain",
        "outcome": outcome(folder / "runs" / "pretrain"),
        "duration_s": time.perf_counter() - started_at,
        "durable_calls": int((folder / "durable_calls").read_text()),
    }


def check_resumes(forker: Forker, folder: Path, reference: dict[str, Any]) -> None:
    """Go on with the killed run of `folder`, and compare all that must be identical."""
    code = forker.run(folder, *GO_ON)
    assert code == 0, (folder / "output.log").read_text()
    run = folder / "runs" / "pretrain"
    assert outcome(run) == reference["outcome"]
    assert not list(run.glob(".partial-*")), "leftovers of the killed process stay"
    assert Run.open(run).state() == "finished"


def wait_for(found: Callable[[], object], pid: int) -> None:
    """Look without pause until something is there, or the process has ended."""
    while not found() and Path(f"/proc/{pid}").exists():
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            return


def test_reference_is_reproducible(
    forker: Forker, reference: dict[str, Any], tmp_path: Path
) -> None:
    write_data(tmp_path)
    assert forker.run(tmp_path, *TRAIN) == 0
    assert outcome(tmp_path / "runs" / "pretrain") == reference["outcome"]
    assert len(reference["outcome"]["hashes"]) == 2
    assert [row[0] for row in reference["outcome"]["log"]] == list(range(1, 31))


@pytest.mark.parametrize("moment", FIRST_OF_4)
def test_killed_at_a_random_time(
    forker: Forker, reference: dict[str, Any], tmp_path: Path, moment: int
) -> None:
    write_data(tmp_path)
    delay_s = random.Random(moment).uniform(0.2, 0.95) * reference["duration_s"]

    def meanwhile(pid: int) -> None:
        time.sleep(delay_s)
        kill(pid)

    assert forker.run(tmp_path, *TRAIN, meanwhile=meanwhile) in (-signal.SIGKILL, 0)
    check_resumes(forker, tmp_path, reference)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(random.Random(seed).choice(range(4, 29, 4)), marks=[pytest.mark.slow] * late)
        for seed, late in ((1, False), (2, True))
    ],
)
def test_killed_while_writing_the_weights(
    forker: Forker, reference: dict[str, Any], tmp_path: Path, step: int
) -> None:
    """The moment at which the temporary folder of a checkpoint appears."""
    write_data(tmp_path)
    run = tmp_path / "runs" / "pretrain"

    def meanwhile(pid: int) -> None:
        wait_for(lambda: list(run.glob(f".partial-checkpoint-{step:08d}-*")), pid)
        kill(pid)

    assert forker.run(tmp_path, *TRAIN, meanwhile=meanwhile) == -signal.SIGKILL
    assert list(run.glob(f".partial-checkpoint-{step:08d}-*")), "the kill came too late"
    check_resumes(forker, tmp_path, reference)


@pytest.mark.parametrize("seed", FIRST_OF_4)
def test_killed_between_two_durable_calls(
    forker: Forker, reference: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    """Before a random fsync or rename: most of them belong to saving a checkpoint."""
    write_data(tmp_path)
    die_at = random.Random(seed).randrange(reference["durable_calls"])
    assert forker.run(tmp_path, *TRAIN, die_at=die_at) == -signal.SIGKILL
    check_resumes(forker, tmp_path, reference)


def test_killed_before_anything_was_written(
    forker: Forker, reference: dict[str, Any], tmp_path: Path
) -> None:
    write_data(tmp_path)
    assert forker.run(tmp_path, *TRAIN, die_at=0) == -signal.SIGKILL
    check_resumes(forker, tmp_path, reference)


@pytest.mark.slow
def test_killed_right_after_the_recipe_was_written(
    forker: Forker, reference: dict[str, Any], tmp_path: Path
) -> None:
    """Then the run's own recipe is all there is to go on with."""
    write_data(tmp_path)
    assert forker.run(tmp_path, *TRAIN, die_at=3) == -signal.SIGKILL
    run = tmp_path / "runs" / "pretrain"
    assert (run / "recipe.yaml").is_file() and not (run / "resolved.yaml").exists()
    code = forker.run(tmp_path, "train", "runs/pretrain/recipe.yaml", "--resume")
    assert code == 0, (tmp_path / "output.log").read_text()
    assert outcome(run) == reference["outcome"]


@pytest.mark.slow
def test_killed_twice(forker: Forker, reference: dict[str, Any], tmp_path: Path) -> None:
    write_data(tmp_path)
    calls = reference["durable_calls"]
    assert forker.run(tmp_path, *TRAIN, die_at=calls // 2) == -signal.SIGKILL
    assert forker.run(tmp_path, *GO_ON, die_at=calls // 4) == -signal.SIGKILL
    check_resumes(forker, tmp_path, reference)
    assert Run.open(tmp_path / "runs" / "pretrain").attempt == 3


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_leaves(
    forker: Forker, reference: dict[str, Any], tmp_path: Path, signum: int, code: int
) -> None:
    """Through the real command, as a terminal or a scheduler stops it."""
    write_data(tmp_path)
    run = tmp_path / "runs" / "pretrain"
    # Without checkpoints of its own, what is saved is what the signal made it save.
    words = (*TRAIN, "checkpoint.every_steps=1000")
    with subprocess.Popen(
        [sys.executable, "-c", "from mule.cli.main import main; main()", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        metrics = run / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3, process.pid)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    [(step, _)] = Run.open(run).checkpoints()
    assert 3 <= step < 30
    assert f"stopped after update {step} of 30; everything is saved in runs/pretrain" in err
    assert "go on with: mule train runs/pretrain/recipe.yaml --resume" in " ".join(err.split())
    assert Run.open(run).state() == "interrupted"
    # The command that the hint names.
    assert forker.run(tmp_path, "train", "runs/pretrain/recipe.yaml", "--resume") == 0
    assert outcome(run)["hashes"] == reference["outcome"]["hashes"]
    assert outcome(run)["log"] == reference["outcome"]["log"]


@pytest.mark.slow
def test_lora_with_dropout_goes_on_identically(
    forker: Forker, reference: dict[str, Any], tmp_path: Path
) -> None:
    outcomes = []
    for name, die in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        write_data(folder)
        (folder / "lora.yaml").write_text(CHAT_RECIPE + LORA)
        words = ("train", "lora.yaml", f"model.path={reference['run']}")
        if die:
            die_at = int((tmp_path / "whole" / "durable_calls").read_text()) // 2
            assert forker.run(folder, *words, die_at=die_at) == -signal.SIGKILL
        assert forker.run(folder, *words, *(["--resume"] if die else [])) == 0
        outcomes.append(outcome(folder / "runs" / "lora"))
    assert outcomes[0] == outcomes[1]
    assert set(outcomes[0]["hashes"]) == {"adapter_model.safetensors", "optimizer.safetensors"}
    assert len(Run.open(tmp_path / "killed" / "runs" / "lora").metrics()) == 16
    assert Run.open(tmp_path / "killed" / "runs" / "lora").attempt == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_run_goes_on_identically(forker: Forker, tmp_path: Path) -> None:
    outcomes = []
    for name, die in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        write_data(folder)
        words = (*TRAIN, "train.compile=true", "train.steps=10")
        if die:
            die_at = int((tmp_path / "whole" / "durable_calls").read_text()) * 2 // 3
            assert forker.run(folder, *words, die_at=die_at) == -signal.SIGKILL
        code = forker.run(folder, *words, *(["--resume"] if die else []))
        assert code == 0, (folder / "output.log").read_text()
        outcomes.append(outcome(folder / "runs" / "pretrain"))
    assert outcomes[0] == outcomes[1]
    assert Run.open(tmp_path / "killed" / "runs" / "pretrain").attempt == 2
