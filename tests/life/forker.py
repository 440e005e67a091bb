"""A fork server: it imports torch once, then forks a child for every command it is asked to run.

One JSON object a line on stdin asks for a run; two lines on stdout answer: the child's process id,
then how it ended. OpenMP must have no threads when a process forks, so there is one thread only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

DURABLE = ("fsync", "rename", "replace")  # what fsio calls to make a write last


def serve() -> None:
    """Answer until stdin closes."""
    import torch

    torch.set_num_threads(1)
    import torch._dynamo  # what making a decoder imports: seconds of each child

    import mule.commands.train
    import mule.train.loop  # noqa: F401

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(job)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def _child(job: dict[str, Any]) -> None:
    """Be `mule <words>` in the folder of the job; never returns."""
    # As a terminal starts it, also where this server was started to ignore them (nohup, &).
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(job["folder"])
    log = os.open("output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    calls = _count_durable_calls(job.get("die_at"))
    from mule.cli import main as cli

    sys.argv = ["mule", *job["words"]]
    code = 1
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        Path("durable_calls").write_text(str(len(calls)))
        os._exit(code)


def _count_durable_calls(die_at: int | None) -> list[str]:
    """Note every durable call, and die of SIGKILL just before the one numbered `die_at`."""
    calls: list[str] = []

    def watch(name: str) -> None:
        original = getattr(os, name)

        def watched(*args: Any) -> Any:
            if len(calls) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            return original(*args)

        setattr(os, name, watched)

    for name in DURABLE:
        watch(name)
    return calls


if __name__ == "__main__":
    serve()
