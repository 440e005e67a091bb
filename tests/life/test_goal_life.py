"""A goal in a run: said when evaluated, logged when reached, without effect on the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from mule.run import Run
from tests.conftest import Mule
from tests.life.tiny_life import outcome, write_data

TRAIN = ("train", "pretrain.yaml", "train.steps=10", "train.precision=fp32")


def test_a_goal_is_reached_and_changes_no_weight(
    mule_cli: Mule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, err = mule_cli(*TRAIN, "goal.val_loss=5.0", "--name", "aimed")
    assert code == 0, err
    assert "goal reached: the validation loss is " in err
    assert "after update 10 (goal.val_loss = 5)" in err or "after update 5 (goal.val_loss" in err
    assert mule_cli(*TRAIN, "--name", "plain")[0] == 0
    aimed, plain = Run.open("runs/aimed"), Run.open("runs/plain")
    assert outcome(aimed.folder) == outcome(plain.folder)
    (event,) = [e for e in aimed.events() if e["kind"] == "goal reached"]
    last = aimed.metrics()[-1]
    assert (last["goal_probability"], last["goal_step"]) == (1.0, event["step"])
    assert "goal_probability" not in plain.metrics()[-1]


def test_a_goal_without_validation_rows_is_refused(
    mule_cli: Mule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, err = mule_cli(*TRAIN, "goal.val_loss=3", "data.valid_share=0")
    assert code != 0
    assert "goal.val_loss = 3 cannot take effect: there are no validation rows" in err
    assert "give data.valid, or a data.valid_share above 0; or remove goal.val_loss" in err
