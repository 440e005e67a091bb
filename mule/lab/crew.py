"""The process that makes one run, seen from the campaign: started, followed, stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mule import fsio
from mule.errors import CheckFailed, Interrupted
from mule.train.signals import StopRequest

_LOOK_EVERY_S = 0.3
_TAIL_BYTES = 65_536
_WORKER = "mule.commands.lab_worker"


def make(
    job: dict[str, Any],
    log: Path,
    stop: StopRequest,
    on_row: Callable[[dict[str, Any]], None],
    *,
    processes: int,
) -> None:
    """Let a process make the run of `job`; its newest row of metrics goes to `on_row` as it trains.

    A wish to stop is passed on once, and the run saves. Raises Interrupted then, and CheckFailed with
    what the run said when it ended with an error.
    """
    _leave_if_asked(stop, job["name"])
    log.parent.mkdir(parents=True, exist_ok=True)
    words = ["-m", _WORKER, json.dumps(job)]
    if processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        words = ["-m", *torchrun, *words]
    metrics, passed_on = Path(job["root"]) / job["name"] / "metrics.jsonl", False
    with fsio.explain_storage(log), open(log, "ab") as out:
        start = out.tell()
        # A session of its own: Ctrl-C of the terminal goes to the campaign, which passes it on.
        child = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                if stop.noted is not None and not passed_on:
                    child.send_signal(stop.noted)
                    passed_on = True
                if row := last_row(metrics):
                    on_row(row)
                time.sleep(_LOOK_EVERY_S)
        finally:
            if child.poll() is None:  # the second signal: leave at once
                child.kill()
                child.wait()
            assert child.stdin is not None
            child.stdin.close()
    if row := last_row(metrics):
        on_row(row)
    _leave_if_asked(stop, job["name"])
    if child.returncode:
        raise _failure(job["name"], log, start, child.returncode)


def _leave_if_asked(stop: StopRequest, name: str) -> None:
    if stop.noted is not None:
        raise Interrupted(stop.noted, f"stopped at the run {name}; all of it is saved")


def last_row(metrics: Path) -> dict[str, Any] | None:
    """The newest whole row of a log, without reading all of it; None before the first."""
    try:
        with open(metrics, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        if line.endswith(b"\n"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                return None
    return None


def _failure(name: str, log: Path, start: int, code: int) -> CheckFailed:
    """What the run said last, from its log."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    for line in reversed(lines):
        if line.startswith('{"error"'):
            said = json.loads(line)
            return CheckFailed(f"{name}: {said['error']}", said["hint"])
    last = lines[-1] if lines else "it said nothing"
    killed = f"killed by signal {-code}" if code < 0 else f"ended with {code}"
    return CheckFailed(f"{name}: {killed}: {last}", f"its log: {log}")
