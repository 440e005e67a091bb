"""Runs a job's command and notes what becomes of it, whether or not a server is there to see it."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from mule import fsio

LOCK, PROCESS, EXIT = "lock", "process.json", "exit"
_CANNOT_START = 127  # as a shell says it


def main() -> None:
    """`python -m mule.web.job_watcher FOLDER COMMAND...`

    The lock is the command's too: it is held until both have ended, however they end. Signals that
    go to a whole session are for the command; this process stays to write how it ended.
    """
    folder, command = Path(sys.argv[1]), sys.argv[2:]
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler, since what is ignored stays ignored in the command.
        signal.signal(signum, lambda _signum, _frame: None)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        process = subprocess.Popen(command, pass_fds=(lock,))
    except OSError as error:
        print(f"error: {command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        fsio.write_text(folder / EXIT, str(_CANNOT_START))
        return
    began = psutil.Process(process.pid).create_time()
    about = {"host": socket.gethostname(), "pid": process.pid, "began_at": began}
    fsio.write_json(folder / PROCESS, about)
    fsio.write_text(folder / EXIT, str(process.wait()))


if __name__ == "__main__":
    main()
