"""Jobs: `mule` commands that outlive the page and the server, and what is told of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mule import fsio
from mule.serve.problem import Problem
from mule.web.jobs import FOLDER, Job, Jobs, environment

LONG = ["ui", "--port", "0", "--read-only", "--json"]  # a light command that runs until a signal
PATIENCE_S = 60


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The jobs of an empty folder; none is left behind."""
    monkeypatch.chdir(tmp_path)
    found = Jobs()
    yield found
    for pid in [job.pid for job in found.all() if job.pid is not None]:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    until(lambda: not any(child.poll() is None for child in found._children))


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def ended(jobs: Jobs, job: Job) -> dict[str, Any]:
    until(lambda: jobs.state(job)["state"] != "running")
    return jobs.state(job)


def begun(jobs: Jobs, job: Job) -> int:
    """The process of the command, once it answers."""
    until(lambda: jobs.state(job)["stdout"].endswith("}\n"))
    return fsio.read_json(jobs.folder / job.id / "process.json")["pid"]


def test_a_job_tells_its_result_or_its_error_with_the_hint(jobs: Jobs) -> None:
    assert jobs.all() == []
    good = jobs.start("recipe", ["recipe", "show", "pretrain-25m", "--json"], "pretrain-25m")
    bad = jobs.start("recipe", ["recipe", "show", "pretrain-25n", "--json"])
    assert jobs.state(good)["state"] == "running" and jobs.result(good) is None
    found = ended(jobs, good)
    assert (found["state"], found["how"], found["exit_code"]) == ("done", "ended well", 0)
    assert found["about"] == "pretrain-25m" and found["ended_at"] >= found["started_at"]
    result = jobs.result(good)
    assert result is not None and result["next"] == "mule train pretrain-25m"
    found = ended(jobs, bad)
    assert (found["state"], found["how"]) == ("failed", "ended with exit code 2")
    assert "hint: did you mean `pretrain-25m`?" in found["stderr"]
    error = jobs.result(bad)
    assert error is not None and error["hint"] == "did you mean `pretrain-25m`?"
    assert [job.id for job in jobs.all()] == [bad.id, good.id]
    assert (FOLDER.parent / ".gitignore").read_text() == "*\n"
    assert (FOLDER / good.id).stat().st_mode & 0o077 == 0


def test_another_server_sees_a_job_and_stops_it(jobs: Jobs) -> None:
    job = jobs.start("ui", LONG)
    other = Jobs()
    begun(other, job)
    assert [other.state(one)["state"] for one in other.all()] == ["running"]
    with pytest.raises(Problem, match="it is running") as refused:
        other.remove(job)
    assert refused.value.hint == "stop it first"
    assert other.tidy(0) == 0
    other.stop(job)
    jobs.stop(job)  # both were pressed: a second signal would end a run without saving
    assert jobs.state(job)["stopping"] or jobs.state(job)["exit_code"] == 130
    found = ended(jobs, job)
    assert (found["state"], found["how"], found["exit_code"]) == (
        *("failed", "stopped on request"),
        130,
    )
    other.stop(job)  # it ended: nothing to do
    assert not found["stopping"]
    other.remove(job)
    assert jobs.all() == []


def test_a_command_goes_on_without_its_watcher(jobs: Jobs) -> None:
    job = jobs.start("ui", LONG)
    command = begun(jobs, job)
    assert job.pid is not None
    os.kill(job.pid, signal.SIGTERM)  # as at the end of a session: the watcher stays
    time.sleep(0.1)
    os.kill(job.pid, signal.SIGKILL)
    watcher = job.pid
    until(lambda: not _lives(watcher))
    assert jobs.state(job)["state"] == "running"
    jobs.stop(job)
    found = ended(jobs, job)
    assert found["state"] == "lost" and "nothing says how it ended" in found["how"]
    assert not _lives(command)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_job_of_another_machine_is_stopped_there_and_a_killed_one_says_so(jobs: Jobs) -> None:
    job = jobs.start("ui", LONG)
    pid = begun(jobs, job)
    file = jobs.folder / job.id / "process.json"
    here = fsio.read_json(file)
    fsio.write_json(file, here | {"host": "a-far-machine"})
    with pytest.raises(Problem, match="it runs on a-far-machine") as refused:
        jobs.stop(job)
    assert refused.value.hint == f"stop it there: kill -INT {pid}"
    fsio.write_json(file, here | {"began_at": 1.0})  # another process has that number by now
    jobs.stop(job)
    assert jobs.state(job)["state"] == "running"
    os.kill(pid, signal.SIGKILL)
    found = ended(jobs, job)
    assert (found["state"], found["how"]) == ("failed", "killed by SIGKILL")


def _ended_job(jobs: Jobs, number: int, exit_code: str | None = "0") -> str:
    name = f"train-{number:08x}"
    folder = jobs.folder / name
    row = {"id": name, "kind": "train", "words": ["train"], "about": "", "started_at": number}
    fsio.write_json(folder / "job.json", row)
    fsio.write_text(folder / "stdout", "")
    fsio.write_text(folder / "stderr", "x" * 200_000)
    if exit_code is not None:
        fsio.write_text(folder / "exit", exit_code)
    return name


def test_old_jobs_are_removed_and_what_is_no_job_is_left(jobs: Jobs) -> None:
    names = [_ended_job(jobs, number) for number in range(1, 6)]
    fsio.write_text(jobs.folder / "notes" / "job.json", "{}")
    fsio.write_text(jobs.folder / "train-0000000f" / "job.json", "{")
    assert [job.id for job in jobs.all()] == names[::-1]
    assert jobs.tidy(2) == 3
    assert [job.id for job in jobs.all()] == names[:2:-1]
    assert (jobs.folder / "notes").is_dir() and not (jobs.folder / names[0]).exists()
    with pytest.raises(Problem, match=r'no job "train-00000001" here'):
        jobs.get(names[0])
    assert len(jobs.state(jobs.get(names[-1]))["stderr"]) == 64 * 1024


@pytest.mark.parametrize(
    ("exit_code", "state", "how"),
    [
        ("143", "failed", "stopped on request"),
        ("-9", "failed", "killed by SIGKILL"),
        ("-2", "failed", "stopped on request"),
        ("1", "failed", "ended with exit code 1"),
        (
            None,
            "lost",
            "nothing says how it ended: its processes were killed, or the machine went off",
        ),
    ],
)
def test_how_a_job_ended(jobs: Jobs, exit_code: str | None, state: str, how: str) -> None:
    found = jobs.state(jobs.get(_ended_job(jobs, 7, exit_code)))
    assert (found["state"], found["how"]) == (state, how)


def test_a_job_gets_what_a_run_needs_of_the_environment_and_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = {
        "HF_HOME": "/models",
        "HF_TOKEN_PATH": "/home/me/token",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "2",
        "https_proxy": "http://proxy:3128",
    }
    dropped = {
        "HF_TOKEN": "hf_secret",
        "HUGGING_FACE_HUB_TOKEN": "hf_secret",
        "WANDB_API_KEY": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "LD_PRELOAD": "/tmp/x.so",
        "PYTHONPATH": "/tmp",
        "HTTPS_PROXY": "http://me:secret@proxy:3128",
    }
    for name, value in {**kept, **dropped}.items():
        monkeypatch.setenv(name, value)
    found = environment()
    assert kept.items() <= found.items() and "PATH" in found
    assert not dropped.keys() & found.keys()
    assert "secret" not in json.dumps(found)
