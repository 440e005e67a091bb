"""Run folders: lock, state, attempts, checkpoints that are damaged or pruned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mule import fsio, progress
from mule.errors import BusyError, StorageError, UserError
from mule.run import Run, list_runs
from tests.notes import Notes


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path, "pizza", "train: {steps: 5}\n")


def save(run: Run, *steps: int) -> None:
    for step in steps:
        with fsio.atomic_folder(run.checkpoint_dir(step)) as folder:
            (folder / "weights").write_bytes(b"%d" % step * 50)
        run.set_latest(step)


def test_create_writes_the_recipe_as_typed(run: Run) -> None:
    assert (run.folder / "recipe.yaml").read_text() == "train: {steps: 5}\n"
    assert run.name == "pizza"
    assert run.state() == "new"


def test_create_refuses_a_folder_that_holds_something(run: Run) -> None:
    root = run.folder.parent
    with pytest.raises(UserError, match="pizza already exists") as caught:
        Run.create(root, "pizza", "")
    assert caught.value.hint == "go on with it: --resume; or start another: --name pizza-2"
    (root / "empty").mkdir()
    assert Run.create(root, "empty", "x").folder == root / "empty"


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "-n", "a b"])
def test_create_refuses_odd_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a run"):
        Run.create(tmp_path, name, "")
    assert list(tmp_path.iterdir()) == []


def test_open_finds_by_name_and_folder_and_names_the_nearest(run: Run, tmp_path: Path) -> None:
    assert Run.open("pizza", tmp_path).folder == tmp_path / "pizza"
    assert Run.open(tmp_path / "pizza").folder == tmp_path / "pizza"
    with pytest.raises(UserError, match="no run called `piza`") as caught:
        Run.open("piza", tmp_path)
    assert caught.value.hint == "did you mean `pizza`?"
    with pytest.raises(UserError) as caught:
        Run.open("zzz", tmp_path)
    assert caught.value.hint == "runs there: pizza"
    with pytest.raises(UserError, match=r"is not a run: it has no recipe\.yaml"):
        Run.open(tmp_path)
    assert [found.name for found in list_runs(tmp_path)] == ["pizza"]


def test_documents_come_back(run: Run) -> None:
    assert run.read_lineage() == {}
    run.write_lineage({"data": "abc"})
    run.write_resolved("train: {steps: 5}\n")
    assert run.read_lineage() == {"data": "abc"}
    assert (run.folder / "resolved.yaml").read_text() == "train: {steps: 5}\n"


# ---------------------------------------------------------------- lock and state


def test_the_lock_names_its_holder_and_state_sees_it(run: Run) -> None:
    other = Run.open(run.folder)
    with run.lock():
        assert run.state() == other.state() == "running"
        with pytest.raises(BusyError, match=f"process {os.getpid()}") as caught, other.lock():
            pass
        assert caught.value.hint == f"wait for it, or stop it: kill {os.getpid()}"
    assert other.state() == "new"
    with other.lock():
        pass


def test_the_lock_clears_what_a_killed_process_left(run: Run) -> None:
    (run.folder / ".partial-checkpoint-00000007-x").mkdir()
    with run.lock():
        assert not list(run.folder.glob(".partial-*"))


def test_state_follows_the_last_attempt(run: Run) -> None:
    with run.lock():
        run.start_attempt()
    assert run.state() == "interrupted"  # killed without a word
    for kind in ("interrupted", "failed", "finished"):
        with run.lock():
            run.start_attempt()
            run.log_event("note", text="not a state")
            run.log_event(kind)
        assert run.state() == kind
    assert run.attempt == 4


def test_a_killed_process_lets_go_of_the_lock(run: Run) -> None:
    code = (
        "import sys, time; from mule.run import Run\n"
        f"run = Run.open({str(run.folder)!r})\n"
        "with run.lock():\n"
        "    run.start_attempt(); print('held', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    assert run.state() == "running"
    with pytest.raises(BusyError, match=f"process {child.pid}"), run.lock():
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert run.state() == "interrupted"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_named(run: Run) -> None:
    run.folder.chmod(0o555)
    try:
        with pytest.raises(StorageError, match=r"cannot write .*run\.lock"), run.lock():
            pass
    finally:
        run.folder.chmod(0o755)


# ---------------------------------------------------------------- logs


def test_rows_carry_attempt_and_time(run: Run) -> None:
    before = time.time()
    assert run.start_attempt() == 1
    run.log_metrics({"step": 1, "loss": 2.5, "grad_norm": float("inf")})
    run.sync()
    (row,) = run.metrics()
    assert row["attempt"] == 1
    assert before - 1 < row["at"] < time.time() + 1
    assert row["grad_norm"] is None


def test_readers_keep_the_newest_attempt_of_a_step(run: Run) -> None:
    for attempt, steps in ((1, (1, 2, 3, 4)), (2, (3, 4, 5))):
        assert run.start_attempt() == attempt
        for step in steps:
            run.log_metrics({"step": step, "loss": attempt * 10 + step})
    assert [row["loss"] for row in Run.open(run.folder).metrics()] == [11, 12, 23, 24, 25]


def test_a_restart_forgets_what_came_after_it(run: Run) -> None:
    run.start_attempt()
    for step in (1, 2, 3, 4):
        run.log_metrics({"step": step, "kind": "train"})
        run.log_samples(step, {"Who?": f"me {step}"})
    run.start_attempt(from_step=2)
    run.log_metrics({"step": 2, "kind": "valid"})
    assert [(row["step"], row["kind"]) for row in run.metrics()] == [
        (1, "train"),
        (2, "train"),
        (2, "valid"),
    ]
    assert [row["step"] for row in run.metrics("valid")] == [2]
    assert [row["answers"]["Who?"] for row in run.samples()] == ["me 1", "me 2"]


def test_reading_a_live_run_changes_nothing(run: Run) -> None:
    run.log_metrics({"step": 1})
    path = run.folder / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 2')  # the writer is in the middle of a line
    before = path.read_bytes()
    names = {file.name for file in run.folder.iterdir()}
    reader = Run.open(run.folder)
    assert [row["step"] for row in reader.metrics()] == [1]
    assert (reader.state(), reader.events(), reader.latest_checkpoint()) == ("new", [], None)
    assert path.read_bytes() == before
    assert {file.name for file in run.folder.iterdir()} == names


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_are_listed_by_step(run: Run) -> None:
    save(run, 100, 20, 3)
    assert [step for step, _ in run.checkpoints()] == [3, 20, 100]
    assert run.checkpoint_dir(20).name == "checkpoint-00000020"


def test_latest_is_what_latest_json_says(run: Run) -> None:
    assert run.latest_checkpoint() is None
    save(run, 20, 30, 10)
    assert run.latest_checkpoint() == (10, run.checkpoint_dir(10))
    run.set_latest(30, loss=1.5)
    assert run.latest() == {"step": 30, "folder": "checkpoint-00000030", "loss": 1.5}


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run: Run, damage: str) -> None:
    save(run, 10, 20)
    weights = run.checkpoint_dir(20) / "weights"
    if damage == "flip":
        weights.write_bytes(b"X" + weights.read_bytes()[1:])
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        (weights if damage == "missing" else weights.with_name(fsio.MANIFEST)).unlink()
    notes = Notes()
    with progress.using(notes), run.lock():
        assert run.latest_checkpoint() == (10, run.checkpoint_dir(10))
    assert len(notes.leveled) == 1
    assert notes.leveled[0].startswith("warning: checkpoint-00000020 is damaged and passed over (")
    assert [event["path"] for event in run.events()] == ["checkpoint-00000020"]


def test_a_reader_logs_no_event(run: Run) -> None:
    save(run, 10, 20)
    (run.checkpoint_dir(20) / "weights").unlink()
    run.latest_checkpoint()
    assert not (run.folder / "events.jsonl").exists()


def test_a_broken_latest_json_falls_back_to_the_newest(run: Run) -> None:
    save(run, 10, 20)
    (run.folder / "latest.json").write_text('{"step"')
    notes = Notes()
    with progress.using(notes):
        assert run.latest_checkpoint() == (20, run.checkpoint_dir(20))
    assert "latest.json is damaged" in notes.leveled[0]


def test_all_damaged_is_an_error_and_not_a_fresh_start(run: Run) -> None:
    save(run, 10, 20)
    for _, path in run.checkpoints():
        (path / "weights").unlink()
    with pytest.raises(StorageError, match="none of its 2 checkpoints is intact") as caught:
        run.latest_checkpoint()
    assert caught.value.hint == "train anew: --name pizza-2"


def test_prune_keeps_the_newest_the_latest_and_the_best(run: Run) -> None:
    save(run, 50, 10, 20, 30, 40)
    run.set_latest(20)
    run.set_best(10, val_loss=1.25)
    run.prune(keep=1)
    assert [step for step, _ in run.checkpoints()] == [10, 20, 50]
    best = json.loads((run.folder / "best.json").read_text())
    assert (best["step"], best["val_loss"]) == (10, 1.25)
    assert not list(run.folder.glob(".partial-*"))


def test_pointing_to_nothing_is_a_defect(run: Run) -> None:
    with pytest.raises(AssertionError):
        run.set_latest(5)


def test_no_torch_is_needed() -> None:
    code = "import sys, mule.run, mule.config.load, mule.machine; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_runs_list_and_show_tell_the_run(run: Run) -> None:
    from mule.commands import runs

    with run.lock():
        run.start_attempt()
        run.log_metrics({"step": 1, "loss": 3.0, "val_loss": 3.5})
        devices = [{"device": "cpu", "peak_resident_bytes": 2**30, "micro_batch_rows": 3}]
        run.log_metrics({"step": 2, "loss": 2.0, "devices": devices})
        save(run, 2)
    run.write_resolved("train:\n  steps: 2  # 1 epoch of 2 updates\n")
    root = run.folder.parent
    listed: dict[str, Any] = runs.list_runs(root)["runs"][0]
    assert (listed["run"], listed["state"], listed["steps"]) == ("pizza", "killed", 2)
    assert (listed["loss"], listed["val_loss"]) == (2.0, 3.5)
    shown = runs.show("pizza", root)
    assert shown["note"].startswith("the last attempt ended without a word after update 2: killed")
    assert shown["devices"] == devices
    assert shown["checkpoints"] == [{"step": 2, "folder": "checkpoint-00000002"}]
    assert shown["reasons"]["train.steps"]["reason"] == "1 epoch of 2 updates"
    assert shown["next"].endswith("pizza/recipe.yaml --resume")
    with run.lock():
        run.log_event("interrupted", step=2, devices=devices)
    shown = runs.show("pizza", root)
    assert (shown["state"], shown["note"]) == ("interrupted", None)
    assert [event["kind"] for event in shown["events"]] == ["interrupted"]
    assert "devices" not in shown["events"][0]
    assert runs.list_runs(root / "none") == {
        "root": str(root / "none"),
        "runs": [],
        "next": "mule train RECIPE",
    }
