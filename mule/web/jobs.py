"""Work that outlives the page and the server: `mule` commands as processes of their own.

A job is a folder `.mule/jobs/<id>/`:

    job.json   what was started, and when     stdout, stderr   what it wrote
    lock       held while it runs             process.json     its process
    exit       the exit code, once it ended   stopping         there once it was asked to end

Nothing here waits for a job or ends with it, and several servers of a folder see the same jobs.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from mule import fsio, locks
from mule.serve.problem import Problem, shown
from mule.web.job_watcher import EXIT, LOCK, PROCESS

FOLDER = Path(".mule") / "jobs"
KEPT_JOBS = 100  # that have ended
_JOB, _STOPPING = "job.json", "stopping"
_ID = re.compile(r"[a-z][a-z0-9-]*-[0-9a-f]{8}")
_STARTING_S = 30.0  # a watcher that holds no lock by then never will
_TAIL_BYTES = 64 * 1024
_RESULT_BYTES = 64 << 20
_ASKED_TO_STOP = (130, 143, -signal.SIGINT, -signal.SIGTERM)
# What a run needs of the environment, and no secret: tokens come from files (rules S8 and S9).
_KEPT_VARIABLES = frozenset(
    "PATH HOME USER LOGNAME LANG LC_ALL TZ TMPDIR XDG_CACHE_HOME XDG_RUNTIME_DIR XDG_DATA_HOME "
    "CC CXX LD_LIBRARY_PATH DYLD_LIBRARY_PATH NO_COLOR SSL_CERT_FILE SSL_CERT_DIR "
    "REQUESTS_CA_BUNDLE NO_PROXY no_proxy HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE HF_ENDPOINT "
    "HF_TOKEN_PATH PYTORCH_CUDA_ALLOC_CONF TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR".split()
)
_KEPT_PREFIXES = ("CUDA_", "OMP_", "MKL_")
_PROXIES = frozenset("HTTP_PROXY HTTPS_PROXY ALL_PROXY http_proxy https_proxy all_proxy".split())


@dataclass(frozen=True)
class Job:
    """One command that was started: `words` after `mule`; `about` is what it works on.

    `pid` leads a session of its processes.
    """

    id: str
    kind: str
    words: tuple[str, ...]
    about: str
    started_at: float
    pid: int | None = None  # until the server that starts it has seen it begin


class Jobs:
    """The jobs below a folder; another server of the same folder sees the same ones."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self._children: list[subprocess.Popen[bytes]] = []  # to be told of when they end

    def start(self, kind: str, words: Sequence[str], about: str = "") -> Job:
        """Start `mule <words>` in a session of its own; gives it at once."""
        self.tidy()
        name = f"{kind}-{secrets.token_hex(4)}"
        assert _ID.fullmatch(name), "kinds are plain words"
        folder = self._make_folder(name)
        job = Job(name, kind, tuple(words), about, time.time())
        fsio.write_json(folder / _JOB, asdict(job))
        command = [sys.executable, "-m", "mule.cli.main", *words]
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            watcher = subprocess.Popen(
                [sys.executable, "-m", "mule.web.job_watcher", str(folder), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment(),
                start_new_session=True,
            )
        self._children.append(watcher)
        job = replace(job, pid=watcher.pid)
        fsio.write_json(folder / _JOB, asdict(job))
        return job

    def all(self) -> list[Job]:
        """Every job, the newest first."""
        self._children = [child for child in self._children if child.poll() is None]
        found = [_read(file) for file in self.folder.glob(f"*/{_JOB}")]
        known = [job for job in found if job is not None]
        return sorted(known, key=lambda job: job.started_at, reverse=True)

    def get(self, id: str) -> Job:
        """The job of this id. Problem 404 where there is none."""
        for job in self.all():
            if job.id == id:
                return job
        raise Problem(404, f"no job {shown(id)} here", code="not_found")

    def state(self, job: Job) -> dict[str, Any]:
        """state (running, done, failed, lost), how in words, and the ends of what it wrote.

        `lost` is a job whose processes were all killed: nothing says how it went.
        """
        running = self._is_running(job)
        code = None if running else self._exit_code(job)
        state = "running" if running else "lost" if code is None else "failed" if code else "done"
        return {
            **asdict(job),
            "state": state,
            "stopping": running and (self.folder / job.id / _STOPPING).exists(),
            "how": "" if running else _how(code),
            "exit_code": code,
            "ended_at": self._ended_at(job),
            "stdout": self._tail(job, "stdout"),
            "stderr": self._tail(job, "stderr"),
        }

    def result(self, job: Job) -> dict[str, Any] | None:
        """The JSON object at the end of what it wrote: its result, or its error with the hint.

        None while it runs, and where there is none.
        """
        if self._is_running(job):
            return None
        lines = self._tail(job, "stdout", _RESULT_BYTES).splitlines()
        try:
            value = json.loads(lines[-1]) if lines else None
        except ValueError:  # a command without --json, or killed while it wrote
            return None
        return value if isinstance(value, dict) else None

    def stop(self, job: Job) -> None:
        """Ask it to save and end, as Ctrl-C does; nothing is killed. A job that ended is left.

        Once only, from whichever server: a second signal would end a run without saving.

        Problem 409 for one that runs on another machine of a shared folder.
        """
        while self._is_running(job) and not (self.folder / job.id / PROCESS).is_file():
            time.sleep(0.05)
        if not self._is_running(job):
            return
        about = fsio.read_json(self.folder / job.id / PROCESS)
        if about["host"] != socket.gethostname():
            raise Problem(
                409,
                f"it runs on {about['host']}, and this server on {socket.gethostname()}",
                code="other_machine",
                hint=f"stop it there: kill -INT {about['pid']}",
            )
        try:
            process = psutil.Process(about["pid"])
            if process.create_time() == about["began_at"] and self._is_first_to_stop(job):
                process.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            return  # it ended just now

    def remove(self, job: Job) -> None:
        """Forget a job that ended, with what it wrote; its run stays. Problem 409 while it runs."""
        if self._is_running(job):
            raise Problem(409, "it is running", code="running", hint="stop it first")
        doomed = self.folder / fsio.partial_name(job.id)  # never seen half removed
        try:
            os.rename(self.folder / job.id, doomed)
        except FileNotFoundError:  # another server was faster
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def tidy(self, keep: int = KEPT_JOBS) -> int:
        """Remove all but the newest `keep` of those that ended; how many went."""
        ended = [job for job in self.all() if not self._is_running(job)]
        for job in ended[keep:]:
            self.remove(job)
        return len(ended[keep:])

    # ------------------------------------------------------------ inside

    def _is_first_to_stop(self, job: Job) -> bool:
        try:
            (self.folder / job.id / _STOPPING).touch(0o600, exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _make_folder(self, name: str) -> Path:
        """Private, since logs quote data; and out of the sight of git."""
        top = self.folder.parent if self.folder.parent.name == FOLDER.parent.name else self.folder
        with fsio.explain_storage(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not (top / ".gitignore").exists():
                fsio.write_text(top / ".gitignore", "*\n")
            (self.folder / name).mkdir(mode=0o700)
        return self.folder / name

    def _is_running(self, job: Job) -> bool:
        folder = self.folder / job.id
        if (folder / EXIT).exists():
            return False
        if locks.is_locked(folder / LOCK):
            return not (folder / EXIT).exists()
        begins = not (folder / PROCESS).exists() and not (folder / EXIT).exists()
        return begins and time.time() - job.started_at < _STARTING_S

    def _exit_code(self, job: Job) -> int | None:
        try:
            return int((self.folder / job.id / EXIT).read_text())
        except FileNotFoundError:
            return None

    def _ended_at(self, job: Job) -> float | None:
        try:
            return (self.folder / job.id / EXIT).stat().st_mtime
        except FileNotFoundError:
            return None

    def _tail(self, job: Job, name: str, num_bytes: int = _TAIL_BYTES) -> str:
        try:
            with (self.folder / job.id / name).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
                return file.read().decode(errors="replace")
        except FileNotFoundError:  # it is being started, or was removed
            return ""


def _read(file: Path) -> Job | None:
    """None for what is no job, or is being removed."""
    if not _ID.fullmatch(file.parent.name):
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Job(**values | {"words": tuple(values["words"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _how(code: int | None) -> str:
    """How a job ended, in words."""
    if code is None:
        return "nothing says how it ended: its processes were killed, or the machine went off"
    if code == 0:
        return "ended well"
    if code in _ASKED_TO_STOP:
        return "stopped on request"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def environment() -> dict[str, str]:
    """What a job gets of this process's environment."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES
        or name.startswith(_KEPT_PREFIXES)
        or (name in _PROXIES and "@" not in value)  # of user:password@host
    }
