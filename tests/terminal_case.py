"""A command in a real terminal, typed into and read as a person does."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

_SECONDS = 60


class Terminal:
    """`mule <words>` on a pseudo-terminal of its own, of this kind and 80 by 24 characters large."""

    def __init__(self, folder: Path, *words: str, kind: str = "dumb") -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            size = {"COLUMNS": "80", "LINES": "24"}
            os.environ |= {"TERM": kind, "NO_COLOR": "1", **size}
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in what a shell put behind
            mule = Path(sys.executable).parent / "mule"
            os.execv(mule, ["mule", *words])
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def until(self, pattern: str) -> str:
        """What is shown from here up to the first match."""
        deadline = time.monotonic() + _SECONDS
        while not (match := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self._terminal], [], [], deadline - time.monotonic())
            assert ready, f"{pattern} was not shown, but: {self.shown}"
            self.shown += os.read(self._terminal, 4096).decode(errors="replace").replace("\r", "")
        seen, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return seen

    def end(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + _SECONDS
        while True:
            ready, _, _ = select.select([self._terminal], [], [], deadline - time.monotonic())
            assert ready, "it did not end"
            try:
                if not os.read(self._terminal, 4096):
                    break
            except OSError:  # Linux says so when the other side is closed
                break
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
