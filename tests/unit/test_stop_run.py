"""A run is stopped through the process that holds it: once, and only when that is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mule.commands import stop
from mule.errors import UserError
from mule.run import Run

# Counts the signals that it gets, and goes when the test lets it.
_TRAINER = """
import signal, sys
from mule.run import Run
count = 0
def note(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, note)
run = Run(__import__("pathlib").Path(sys.argv[1]))
with run.lock():
    run.start_attempt(from_step=0)
    print("begun", flush=True)
    sys.stdin.readline()
    print(count, flush=True)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path, "pizza", "model: {}\n")


@pytest.fixture
def trainer(run: Run) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", _TRAINER, str(run.folder)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def test_the_trainer_gets_one_signal_however_often_it_is_asked(
    run: Run, trainer: subprocess.Popen[str]
) -> None:
    assert stop.holder(run) == trainer.pid
    assert not stop.was_asked(run)
    for _ in range(3):  # a second signal would end it without saving
        assert stop.run("pizza", run.folder.parent)["pid"] == trainer.pid
    assert stop.was_asked(run)
    assert trainer.communicate("\n")[0] == "1\n"
    assert stop.holder(run) is None


def test_a_run_that_nobody_trains_cannot_be_stopped(run: Run) -> None:
    with pytest.raises(UserError, match="pizza is not running") as error:
        stop.run(str(run.folder))
    assert error.value.hint == "see mule runs show pizza"


def test_a_process_of_another_machine_is_not_asked(run: Run) -> None:
    with run.lock():
        assert stop.holder(run) == os.getpid()
        for told in (str(os.getppid()), "999999999", "no number", ""):
            (run.folder / "run.lock").write_text(f"{told}\n")
            assert stop.holder(run) is None, told
            with pytest.raises(UserError, match="not of this machine, or not yours") as error:
                stop.run(str(run.folder))
            assert "stop it where it runs" in error.value.hint
