"""A run with dropout and activation checkpointing that is killed goes on to the very same bits."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from mule.run import Run
from tests.life.tiny_life import Forker, outcome, write_data

TRAIN = ("train", "pretrain.yaml", "train.steps=12", "train.dropout=0.2")


def trained(forker: Forker, folder: Path, *words: str, die_at: int | None = None) -> dict[str, Any]:
    """The outcome of a run; with `die_at` of one that was killed there and resumed."""
    write_data(folder)
    if die_at is not None:
        assert forker.run(folder, *TRAIN, *words, die_at=die_at) == -signal.SIGKILL
        words += ("--resume",)
    code = forker.run(folder, *TRAIN, *words)
    assert code == 0, (folder / "output.log").read_text()
    return outcome(folder / "runs" / "pretrain")


@pytest.fixture(scope="module")
def reference(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dropout")
    found = trained(forker, folder)
    return {"outcome": found, "durable_calls": int((folder / "durable_calls").read_text())}


@pytest.mark.slow
def test_killed_and_resumed(forker: Forker, reference: dict[str, Any], tmp_path: Path) -> None:
    found = trained(forker, tmp_path, die_at=reference["durable_calls"] // 2)
    assert found == reference["outcome"]
    assert Run.open(tmp_path / "runs" / "pretrain").attempt == 2


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_computing_again_changes_nothing(
    forker: Forker, reference: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    word = f"train.activation_checkpointing={kind}"
    assert trained(forker, tmp_path / "whole", word) == reference["outcome"]


def test_dropout_is_there(forker: Forker, reference: dict[str, Any], tmp_path: Path) -> None:
    found = trained(forker, tmp_path, "train.seed=4")
    assert found["log"][0] != reference["outcome"]["log"][0]
    write_data(tmp_path / "none")
    assert forker.run(tmp_path / "none", *TRAIN[:3]) == 0
    plain = outcome(tmp_path / "none" / "runs" / "pretrain")
    assert plain["log"][0] != reference["outcome"]["log"][0]
