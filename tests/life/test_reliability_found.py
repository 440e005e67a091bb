"""What harness A found, each as the smallest trial that shows it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mule import fsio
from mule.errors import StorageError
from mule.run import Run
from tests.life.harness import (
    RUN,
    SHORT,
    TRAIN,
    FaultForker,
    Lab,
    _failing,
    _full_disk,
    read_trace,
    said,
)


@pytest.fixture(scope="module")
def lab(machine_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    server = FaultForker()
    yield Lab(tmp_path_factory.mktemp("lab"), server)
    server.close()


@pytest.mark.slow
def test_killed_between_the_pointers_to_latest_and_best(lab: Lab) -> None:
    """latest.json is written, best.json is not: the resumed run must make up for it."""
    fault = {"call": "mule.run.Run.set_best", "nth": 2, "act": int(signal.SIGKILL)}
    with lab.folder() as folder:
        assert lab.server.run(folder, *TRAIN, *SHORT, fault=fault) == -signal.SIGKILL, said(folder)
        lab.check_goes_on(folder, *SHORT)


@pytest.mark.slow
def test_power_lost_before_the_log_is_synced(lab: Lab) -> None:
    """The first checkpoint is there, the rows that led to it are not: they must come again."""
    fault = {"call": "mule.run.Run.sync", "nth": 1, "act": int(signal.SIGKILL)}
    with lab.folder() as folder:
        assert lab.server.run(folder, *TRAIN, *SHORT, fault=fault) == -signal.SIGKILL, said(folder)
        (folder / RUN / "metrics.jsonl").write_bytes(b"")
        lab.check_goes_on(folder, *SHORT)


@pytest.mark.parametrize("key", ["files", "bytes", "sha256"])
def test_a_flipped_bit_in_a_key_of_the_manifest(lab: Lab, tmp_path: Path, key: str) -> None:
    home = lab.reference(*SHORT)["folder"] / RUN / "checkpoint-00000004"
    folder = tmp_path / "checkpoint"
    shutil.copytree(home, folder)
    file = folder / fsio.MANIFEST
    file.write_text(file.read_text().replace(f'"{key}"', f'"{key[:-1]}~"', 1))
    with pytest.raises(StorageError, match="manifest"):
        fsio.verify_folder(folder)


def test_the_lock_of_a_preparation_cannot_be_removed(lab: Lab) -> None:
    trace = [event for event in read_trace(lab.reference(*SHORT)["trace"]) if "op" in event]
    [number] = [
        event["number"]
        for event in trace
        if event["op"] == "unlink" and event["path"].endswith(".lock")
    ]
    _failing(lab, "EIO", number, [])


def test_an_old_checkpoint_cannot_be_moved_aside(lab: Lab) -> None:
    trace = [event for event in read_trace(lab.reference(*SHORT)["trace"]) if "op" in event]
    [number] = [
        event["number"]
        for event in trace
        if event["op"] == "rename" and event["path"].endswith("/checkpoint-00000002")
    ]
    _failing(lab, "EIO", number, [])


@pytest.mark.slow
def test_the_disk_fills_up_in_a_tensor_of_an_export(lab: Lab) -> None:
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    _full_disk(lab, "export", 8192)


@pytest.mark.parametrize("nth", [1, 2], ids=["in between", "the last"])
def test_a_stop_ends_an_evaluation_and_the_resumed_run_makes_up_for_it(lab: Lab, nth: int) -> None:
    call = "mule.train.evaluator.held_out_loss"
    with lab.folder() as folder:
        fault = {"call": call, "nth": nth, "act": int(signal.SIGTERM)}
        assert lab.server.run(folder, *TRAIN, *SHORT, fault=fault) == 143, said(folder)
        [stopped] = Run.open(folder / RUN).standing_events("interrupted")
        row = next(r for r in Run.open(folder / RUN).metrics() if r["step"] == stopped["step"])
        assert "loss" in row and "val_loss" not in row
        lab.check_goes_on(folder, *SHORT)
        rows = {row["step"]: row for row in Run.open(folder / RUN).metrics()}
        expected = {
            row["step"]: row for row in Run.open(lab.reference(*SHORT)["folder"] / RUN).metrics()
        }
        assert rows[stopped["step"]]["val_loss"] == expected[stopped["step"]]["val_loss"]
