"""Runs a command that ends with the process that started this one, however that one ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

_PATIENCE_S = 10.0  # that it is given after it was asked to end


def main() -> None:
    """`python -m mule.web.owned_process COMMAND...`; the owner holds a pipe to its stdin."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_owner, args=(child,), daemon=True).start()
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)


def _end_with_owner(child: subprocess.Popen[bytes]) -> None:
    while os.read(sys.stdin.fileno(), 1):  # nothing is written: it ends when the owner does
        pass
    child.terminate()
    try:
        child.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()


if __name__ == "__main__":
    main()
