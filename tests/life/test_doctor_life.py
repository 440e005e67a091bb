"""The doctor in a real training: it watches, the report is written, and the run learns the same."""

from __future__ import annotations

from pathlib import Path

from mule.run import Run
from mule.train.watch import DOCTOR
from tests.life.tiny_life import Forker, outcome, write_data


def test_a_training_is_watched_and_reported(forker: Forker, tmp_path: Path) -> None:
    words = ("train", "pretrain.yaml", "optim.warmup_steps=20")
    write_data(tmp_path)
    assert forker.run(tmp_path, *words) == 0
    run = Run(tmp_path / "runs" / "pretrain")
    events = [event for event in run.standing_events(DOCTOR) if event["code"] == "D304"]
    assert [(event["step"], event["severity"]) for event in events] == [(5, "warning")]
    said = (tmp_path / "output.log").read_text()
    assert said.count("warm-up too long (D304") == 1
    report = (run.folder / "report.md").read_text()
    assert "(D304), since update 1: the warm-up takes 20 of 30 updates (67%)" in report
    assert "30 of 30 updates" in report
    calls = int((tmp_path / "durable_calls").read_text())

    again = tmp_path / "again"
    write_data(again)
    forker.run(again, *words, die_at=calls // 2)
    assert forker.run(again, "train", "runs/pretrain/recipe.yaml", "--resume") == 0
    resumed = Run(again / "runs" / "pretrain")
    assert outcome(resumed.folder) == outcome(run.folder)
    assert len([e for e in resumed.standing_events(DOCTOR) if e["code"] == "D304"]) == 1
    assert forker.run(again, "doctor", "pretrain") == 0  # a warning is no failure
