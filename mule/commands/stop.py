"""Stopping a run that trains on this machine, wherever it was started: it saves and ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from mule import locks
from mule.errors import UserError
from mule.run import RUNS, Run

_LOCK = "run.lock"
_asked: set[tuple[str, int, int]] = set()  # folder, attempt, process


def run(name: str, root: Path = RUNS) -> dict[str, Any]:
    """Send the process that writes the run what Ctrl-C sends; it saves, and can be resumed.

    Once only: a second signal would end it without saving. Raises UserError when no process of this
    machine and user writes it.
    """
    opened = Run.open(name, root)
    if opened.state() != "running":
        raise UserError(f"{opened.folder} is not running", f"see mule runs show {opened.name}")
    pid = holder(opened)
    if pid is None:
        told = (opened.folder / _LOCK).read_text(encoding="utf-8").strip()
        raise UserError(
            f"{opened.folder} is written by process {told or 'unknown'}, which is not of this "
            "machine, or not yours",
            f"stop it where it runs: kill -INT {told}" if told else "stop it where it runs",
        )
    if not was_asked(opened):
        os.kill(pid, signal.SIGINT)
        _asked.add((str(opened.folder.resolve()), opened.attempt, pid))
    return {"run": opened.name, "pid": pid, "next": f"mule runs show {opened.name}"}


def was_asked(run: Run) -> bool:
    """Whether this attempt was sent the signal by this process already: it is saving."""
    attempt = Run(run.folder).attempt
    return any(known[:2] == (str(run.folder.resolve()), attempt) for known in _asked)


def holder(run: Run) -> int | None:
    """The process of this machine and user that writes the run; None where there is none.

    A number in the lock could be another machine's, or an old one's: the process has the file open.
    """
    import psutil

    lock = (run.folder / _LOCK).resolve()
    if not locks.is_locked(lock):
        return None
    try:
        process = psutil.Process(int(lock.read_text(encoding="utf-8")))
        opened = {file.path for file in process.open_files()}
    except (ValueError, psutil.Error, OSError):
        return None
    return process.pid if str(lock) in opened else None
