"""Runs with other optimizers than AdamW: killed, they go on to the very same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mule.run import Run
from tests.life.tiny_life import Forker, outcome, write_data

# Some matrices are large enough for 8-bit moments.
TRAIN = (
    *("train", "pretrain.yaml", "train.steps=12", "model.hidden_size=80"),
    "model.intermediate_size=104",
)
KINDS = {
    "muon": ("optim.kind=muon", "optim.momentum=0.9"),
    "adamw8bit": ("optim.kind=adamw8bit", "optim.ema_decay=0.9"),
}
STATE = {
    "muon": {"momentum", "exp_avg", "exp_avg_sq"},
    "adamw8bit": {"exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "ema"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_identically(forker: Forker, tmp_path: Path, kind: str) -> None:
    outcomes = []
    for name, die in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        write_data(folder)
        words = (*TRAIN, *KINDS[kind])
        if die:
            die_at = int((tmp_path / "whole" / "durable_calls").read_text()) * 2 // 3
            assert forker.run(folder, *words, die_at=die_at) == -signal.SIGKILL
            assert Run.open(folder / "runs" / "pretrain").latest_checkpoint() is not None
        code = forker.run(folder, *words, *(["--resume"] if die else []))
        assert code == 0, (folder / "output.log").read_text()
        outcomes.append(outcome(folder / "runs" / "pretrain"))
    assert outcomes[0] == outcomes[1]
    assert set(outcomes[0]["hashes"]) == {"model.safetensors", "optimizer.safetensors"}
    run = Run.open(tmp_path / "killed" / "runs" / "pretrain")
    assert run.attempt == 2
    losses = [row["loss"] for row in run.metrics()]
    assert len(losses) == 12 and losses[-1] < losses[0]
    with safe_open(run.checkpoints()[-1][1] / "optimizer.safetensors", framework="pt") as saved:
        assert {name.partition(".")[0] for name in saved.keys()} == STATE[kind]


def test_the_averaged_weights_are_evaluated_and_kept(forker: Forker, tmp_path: Path) -> None:
    write_data(tmp_path)
    words = (*TRAIN, "optim.ema_decay=0.8")
    assert forker.run(tmp_path, *words) == 0, (tmp_path / "output.log").read_text()
    assert "runs/pretrain/ema" in (tmp_path / "output.log").read_text()
    run = Run.open(tmp_path / "runs" / "pretrain")
    evaluated = [row for row in run.metrics() if "val_loss" in row]
    assert [row["step"] for row in evaluated] == [5, 10, 12]
    assert all(row["val_loss_ema"] != row["val_loss"] for row in evaluated)
    assert evaluated[0]["val_loss_ema"] > evaluated[-1]["val_loss_ema"]
    # The folder is a model of the averages in the last checkpoint.
    weights = load_file(run.folder / "ema" / "model.safetensors")
    state = load_file(run.checkpoints()[-1][1] / "optimizer.safetensors")
    assert weights and all(torch.equal(t, state[f"ema.{name}"]) for name, t in weights.items())
    chat = ("chat", "runs/pretrain/ema", "--prompt", "the cat", "--max-tokens", "3")
    assert forker.run(tmp_path, *chat) == 0, (tmp_path / "output.log").read_text()
