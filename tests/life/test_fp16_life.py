"""A run in fp16: skipped updates on the way, stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mule.run import Run
from mule.train import loop, scaler
from tests.conftest import Mule
from tests.life.test_distributed import Ranks
from tests.life.tiny_life import outcome, write_data

TRAIN = ("train", "pretrain.yaml", "train.precision=fp16", "train.steps=14")
_STOP_AT = 6  # amid the updates that overflow


@pytest.fixture(autouse=True)
def too_large_a_scale(monkeypatch: pytest.MonkeyPatch, machine_cache: None) -> None:
    monkeypatch.setattr(scaler, "_START", 2.0**28)


def test_a_stopped_fp16_run_goes_on_to_the_same_bits(
    mule_cli: Mule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: tmp_path / name for name in ("whole", "stopped")}
    for folder in folders.values():
        write_data(folder)
    monkeypatch.chdir(folders["whole"])
    code, _, err = mule_cli(*TRAIN)
    assert code == 0, err
    monkeypatch.chdir(folders["stopped"])
    train_step, calls = loop.train_step, []

    def stopping(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == _STOP_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        assert mule_cli(*TRAIN)[0] == 143
    code, _, err = mule_cli(*TRAIN, "--resume")
    assert code == 0, err
    runs = {name: folder / "runs" / "pretrain" for name, folder in folders.items()}
    assert outcome(runs["stopped"]) == outcome(runs["whole"])
    for name, run in runs.items():
        skipped = [e for e in Run.open(run).events() if e["kind"] == "update skipped"]
        # Nothing is saved after a skipped update: the resumed run skips the same ones again.
        steps = sorted({event["step"] for event in skipped})
        assert steps[:_STOP_AT] == list(range(1, _STOP_AT + 1)), name
        assert skipped[0]["cause"] == (
            "gradient beyond fp16 at loss scale 268,435,456, now 134,217,728"
        )
        state = json.loads((Run.open(run).checkpoints()[-1][1] / "state.json").read_text())
        assert state["loss_scale"] == {
            "scale": 2.0 ** (28 - len(steps)),
            "num_good": 14 - steps[-1],
            "num_overflows": len(steps),
        }
        # Skipped updates have no row.
        assert [row["step"] for row in Run.open(run).metrics()] == [
            step for step in range(1, 15) if step not in steps
        ]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    losses, server = [], Ranks()
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        write_data(folder)
        ended = server.run(folder, world_size, *TRAIN)
        assert ended.codes == [0] * world_size, ended.texts
        run = Run.open(folder / "runs" / "pretrain")
        losses.append([row["loss"] for row in run.metrics()])
        state = json.loads((run.checkpoints()[-1][1] / "state.json").read_text())
        assert state["loss_scale"] == {"scale": 2.0**16, "num_good": 14, "num_overflows": 0}
    server.close()
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
