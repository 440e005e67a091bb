"""Runs at a glance, again and again: summaries from the ends of logs, kept while nothing changes."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mule.cli.tables import show_runs
from mule.commands.run_files import Kept, stamp_of
from mule.commands.run_look import looks, outlooks, verdicts
from mule.commands.run_page import about, head, samples
from mule.commands.runs import files, list_runs, summaries, summary
from mule.run import Run
from tests.doctor_case import history, run_folder
from tests.forecast_curves import course, curve
from tests.forecast_curves import write_run as write_curve


def _settings(run: Run, **values: Any) -> None:
    known = {"steps": 100, "every": 10} | values
    adapter = f"adapter:\n  kind: {known['adapter']}\n" if "adapter" in known else ""
    path = "model:\n  path: base\n" if "path" in known else ""
    run.write_resolved(
        f"{path}train:\n  steps: {known['steps']}  # 2 epochs\nevaluate:\n"
        f"  every_steps: {known['every']}\n{adapter}"
    )


def test_a_summary_says_what_is_done_and_what_is_left(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "pizza", "model: {}\n")
    told = summary(run)
    assert (told["state"], told["stage"], told["num_steps"]) == ("new", None, None)
    _settings(run)
    with run.lock():
        run.start_attempt(from_step=0)
        run.log_metrics({"step": 19, "loss": 3.0, "val_loss": 3.5})
        run.log_metrics({"step": 20, "loss": 2.0, "steps_per_second": 4.0})
        told = summary(run)
        assert (told["state"], told["stage"], told["left_s"]) == ("running", "pretrain", 20.0)
        assert (told["steps"], told["num_steps"], told["val_loss"]) == (20, 100, 3.5)
    told = summary(run)
    assert (told["state"], told["left_s"]) == ("killed", None)
    assert "ended without a word after update 20" in told["note"]


@pytest.mark.parametrize(
    ("settings", "kind", "stage"),
    [
        ({}, "text", "pretrain"),
        ({"path": "base"}, "chat", "SFT"),
        ({"path": "base"}, "text", "continued pretraining"),
        ({"path": "base", "adapter": "lora"}, "chat", "LoRA"),
        ({"path": "base", "adapter": "qlora"}, "chat", "QLoRA"),
        ({"path": "base", "adapter": "none"}, "chat", "SFT"),
    ],
)
def test_the_stage_is_told_by_the_recipe(
    tmp_path: Path, settings: dict[str, Any], kind: str, stage: str
) -> None:
    run = Run.create(tmp_path, "pizza", "model: {}\n")
    _settings(run, **settings)
    run.write_lineage({"kind": kind})
    assert summary(run)["stage"] == stage


def test_only_the_end_of_a_long_log_is_read_but_far_enough(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "pizza", "model: {}\n")
    _settings(run, steps=9000, every=2500)
    with run.lock():
        run.start_attempt(from_step=0)
        for step in range(1, 5001):
            row = {"step": step, "loss": 1.0, "tokens_per_second": 1.0, "share_of_peak": 0.1}
            if step == 3000:
                row |= {"val_loss": 3.0, "val_perplexity": 20.0}
            run.log_metrics(row)
    told = summary(run)
    assert (told["steps"], told["val_loss"]) == (5000, 3.0)
    with run.lock():  # what was logged last is taken back
        run.start_attempt(from_step=100)
        assert summary(Run(run.folder))["steps"] == 100


def test_what_is_known_is_kept_until_a_file_or_the_lock_changes(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "pizza", "model: {}\n")
    asked: list[str] = []

    def find(run: Run) -> int:
        asked.append(run.name)
        return len(asked)

    kept = Kept(find)
    assert kept.last(run) is None
    assert [kept.of(run), kept.of(run)] == [1, 1]
    with run.lock():
        assert not kept.is_fresh(run)
        assert kept.of(run) == 2
        run.log_metrics({"step": 1, "loss": 1.0})
        assert (kept.last(run), kept.of(run)) == (2, 3)
    assert kept.of(run) == 4  # the process has left


def test_a_live_run_is_looked_at_for_a_small_share_of_the_time(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "pizza", "model: {}\n")
    kept = Kept(lambda run: (time.sleep(0.02), time.monotonic())[1], share_of_time=0.01)
    with run.lock():
        first = kept.of(run)
        run.log_metrics({"step": 1, "loss": 1.0})
        assert kept.is_fresh(run)
        assert kept.of(run) == first
    assert kept.of(run) > first  # it ended: now it counts


def test_200_runs_are_listed_at_once_and_again_for_next_to_nothing(tmp_path: Path) -> None:
    model = run_folder(tmp_path / "runs", history(num_steps=100))
    for place in range(199):
        shutil.copytree(model.folder, tmp_path / "runs" / f"case-{place}")
    kept = summaries()
    began = time.process_time()
    assert len(list_runs(tmp_path / "runs", kept)["runs"]) == 200
    first = time.process_time() - began
    again = time.process_time()
    found = list_runs(tmp_path / "runs", kept)
    assert time.process_time() - again < first / 2
    assert first < 4
    assert found["runs"][0]["num_steps"] == 100


def test_the_list_is_sorted_by_the_last_change(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = Run.create(tmp_path, name, "model: {}\n")
        with run.lock():
            run.start_attempt(from_step=0)
            run.log_event("interrupted", step=0)
    with Run(tmp_path / "a").lock():
        Run(tmp_path / "a").log_event("note")
    assert [row["run"] for row in list_runs(tmp_path)["runs"]] == ["a", "b"]


def test_the_list_in_a_terminal(tmp_path: Path) -> None:
    def shown() -> list[str]:
        console = Console(record=True, width=120, file=io.StringIO())
        show_runs(console, list_runs(tmp_path))
        return console.export_text().splitlines()

    assert shown() == [f"no runs in {tmp_path}"]
    run = Run.create(tmp_path, "pizza", "model: {}\n")
    _settings(run)
    with run.lock():
        run.start_attempt(from_step=0)
        rates = {"steps_per_second": 4.0, "tokens_per_second": 12_300.0}
        run.log_metrics({"step": 20, "loss": 2.0, **rates})
        head, row = shown()
    assert head.split()[:5] == ["run", "state", "stage", "updates", "left"]
    assert row.split()[:9] == [
        "pizza",
        "running",
        "pretrain",
        "20/100",
        "20",
        "s",
        "2",
        "-",
        "12.3k",
    ]


# ---------------------------------------------------------------- looks


def test_verdicts_come_as_far_as_the_time_goes(tmp_path: Path) -> None:
    run_folder(tmp_path, history(num_steps=80))
    Run.create(tmp_path, "new", "model: {}\n")
    kept = looks()
    first = verdicts(kept, tmp_path, seconds=-1)
    assert first == {"verdicts": {}, "more": True}
    told = verdicts(kept, tmp_path, seconds=60)
    assert not told["more"]
    assert told["verdicts"]["new"] == {"verdict": "", "worst": ""}
    assert told["verdicts"]["case"]["worst"] in ("good", "warning", "alarm")
    assert verdicts(kept, tmp_path, seconds=-1) == told  # nothing is left to look at


def test_a_look_explains_each_finding(tmp_path: Path) -> None:
    case = history(num_steps=200, norm=lambda step: 60.0, settings=["optim.max_grad_norm=0.01"])
    look = looks().of(run_folder(tmp_path, case))
    assert look["worst"] in ("warning", "alarm")
    clipped = next(row for row in look["findings"] if row["code"] == "D203")
    assert [part["heading"] for part in clipped["sections"]][:2] == [
        "What it sees",
        "Why it matters",
    ]


def test_a_large_log_is_looked_at_by_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mule.commands import run_look

    run = run_folder(tmp_path, history(num_steps=80))
    here = looks().of(run)
    monkeypatch.setattr(run_look, "_LARGE_BYTES", 0)
    there = looks().of(run)
    assert there["verdict"] == here["verdict"]
    assert [row["code"] for row in there["findings"]] == [row["code"] for row in here["findings"]]


def test_an_outlook_has_milestones_up_to_the_end(tmp_path: Path) -> None:
    run = write_curve(tmp_path / "runs", "half", curve(course(400)), until=200)
    found = outlooks().of(run)
    steps = [row["step"] for row in found["forecast"] if row["figure"] == "loss"]
    assert steps == sorted(steps)
    assert (len(steps), steps[0], steps[-1]) == (8, 225, 400)
    assert outlooks().of(Run.create(tmp_path / "runs", "new", "model: {}\n"))["forecast"] == []


# ---------------------------------------------------------------- the page of a run


def test_the_head_says_what_can_be_done(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "pizza", "model: {}\n")
    kept = summaries()
    assert head(run, kept)["can"] == "resume"
    with run.lock():
        run.start_attempt(from_step=0)
        now = head(run, kept)
        assert (now["can"], now["elsewhere"]) == ("stop", False)
        assert now["next"] == "mule runs watch pizza"
        (run.folder / "run.lock").write_text("999999999\n")  # another machine's
        assert (head(run, kept)["can"], head(run, kept)["elsewhere"]) == ("", True)
        run.log_event("finished", step=0)
    assert head(run, kept)["can"] == ""


def test_samples_are_told_by_prompt_the_newest_first(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "pizza", "model: {}\n")
    with run.lock():
        run.start_attempt(from_step=0)
        for step in range(0, 60, 2):
            run.log_samples(step, {"why?": f"because {step}"})
    (told,) = samples(run)
    assert (told["prompt"], told["of"], len(told["answers"])) == ("why?", 30, 24)
    assert (told["answers"][0]["step"], told["answers"][-1]["step"]) == (58, 0)


def test_about_has_recipe_lineage_files_and_report(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "pizza", "model: {}\n")
    assert about(run)["settings"] == {}
    _settings(run)
    run.write_lineage({"kind": "text", "sources": [{"file": "a.txt"}], "base": {"path": None}})
    (run.folder / "checkpoint-00000002").mkdir()
    (run.folder / "checkpoint-00000002" / "weights").write_bytes(b"12345")
    (run.folder / "report.md").write_text("# pizza\n")
    told = about(run)
    assert told["settings"]["train.steps"] == {"value": "100", "reason": "2 epochs"}
    assert told["typed"] == "model: {}\n"
    assert told["lineage"] == {"kind": "text", "sources.1.file": "a.txt"}
    assert told["report"] == "# pizza\n"
    folder = next(row for row in files(run) if row["name"] == "checkpoint-00000002/")
    assert (folder["size_bytes"], folder["files"]) == (5, 1)


def test_a_stamp_changes_with_the_files_and_the_lock(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "pizza", "model: {}\n")
    seen = [stamp_of(run.folder)]
    with run.lock():
        seen.append(stamp_of(run.folder))
        run.log_samples(1, {"a": "b"})
        seen.append(stamp_of(run.folder))
    seen.append(stamp_of(run.folder))
    assert len(set(seen)) == 4
    assert json.loads((run.folder / "samples.jsonl").read_text())["answers"] == {"a": "b"}
