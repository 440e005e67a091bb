"""A server that forks a child for every preparation it is asked for, so that it can be killed.

One JSON object a line on stdin: {"start": job} is answered by the child's process id, {"wait": id}
by how it ended. The server itself never encodes: a process must have no threads when it forks.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from mule import progress
from mule.data import encode, produce
from mule.data.prepare import RowSettings, prepare, prepare_pair
from mule.data.sources.options import ReadOptions
from mule.tokenizer import Tokenizer
from tests.life.forker import _count_durable_calls


class Preparer:
    """The server, from the side of a test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.life.preparer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, **job: Any) -> int:
        """A child's process id."""
        return self._ask({"start": job})

    def wait(self, pid: int) -> int:
        """How it ended: its exit code, or minus its signal."""
        return self._ask({"wait": pid})

    def close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _ask(self, question: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


class _Notes(progress.Silence):
    """Notes go to a file as they come."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def note(self, text: str, level: str) -> None:
        with open(self._file, "a") as opened:
            print(text, file=opened)


def _child(job: dict[str, Any]) -> None:
    """Prepare in the folder of the job; its figures go to result.json. Never returns."""
    os.chdir(job["folder"])
    log = os.open("output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        calls = _count_durable_calls(job.get("die_at"))
        encode._BATCH_CHARS = job.get("batch_chars", encode._BATCH_CHARS)
        produce._SYNC_CHARS = job.get("sync_chars", produce._SYNC_CHARS)
        settings = RowSettings(ReadOptions(), job.get("max_seq_length", 64))
        tokenizer = Tokenizer.load(job["tokenizer"])
        with progress.using(_Notes(Path(job.get("notes", "notes")))):
            if job.get("hold_out"):
                prepare_pair(
                    [job["file"]], None, tokenizer, settings, valid_share=0.2, seed=1, out_dir="p"
                )
            else:
                prepare([job["file"]], tokenizer, settings, out_dir="p")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path("result.json").write_text(json.dumps({"calls": len(calls), "peak_bytes": peak}))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def serve() -> None:
    """Answer until stdin closes."""
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            answer = os.fork()
            if answer == 0:
                _child(question["start"])
        else:
            _, status = os.waitpid(question["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
