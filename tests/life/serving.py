"""`mule serve` in a process of its own, for the tests of its whole life."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.life.tiny_life import Forker

_SECONDS_TO_START = 60


@dataclass
class Served:
    """A server that listens; `code` is its exit code once it has ended."""

    url: str
    token: str
    token_file: Path
    models: list[str]
    pid: int
    log: Path
    code: int | None = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2].partition("/")[0])


@contextmanager
def serving(
    forker: Forker, folder: Path, *words: str, stop: signal.Signals = signal.SIGTERM
) -> Iterator[Served]:
    """Run `mule serve <words>` in `folder` on a free port; `stop` ends it."""
    log = folder / "output.log"
    log.unlink(missing_ok=True)
    pids: queue.Queue[int] = queue.Queue()
    codes: list[int] = []

    def work() -> None:
        line = ("serve", *words, "--port", "0", "--json")
        codes.append(forker.run(folder, *line, meanwhile=pids.put))

    thread = threading.Thread(target=work)
    thread.start()
    pid = pids.get(timeout=_SECONDS_TO_START)
    deadline = time.monotonic() + _SECONDS_TO_START
    while not (found := [line for line in _lines(log) if line.startswith('{"url"')]):
        assert thread.is_alive() and time.monotonic() < deadline, "\n".join(_lines(log))
        time.sleep(0.02)
    started = json.loads(found[0])
    file = Path(started["token_file"])
    served = Served(started["url"], file.read_text().strip(), file, started["models"], pid, log)
    try:
        yield served
    finally:
        if thread.is_alive():
            os.kill(pid, stop)
        thread.join(_SECONDS_TO_START)
        served.code = codes[0] if codes else None


def _lines(log: Path) -> list[str]:
    return log.read_text().split("\n")[:-1] if log.exists() else []
