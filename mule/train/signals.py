"""Stopping on request: the first SIGINT or SIGTERM is noted, the second acts at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """`signum` is the signal that asked to stop, or None."""

    signum: int | None = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM inside the block, so that the loop can save and leave."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {signum: signal.getsignal(signum) for signum in signals}

    def note(signum: int, _frame: FrameType | None) -> None:
        request.signum = signum
        for known, handler in previous.items():
            signal.signal(known, handler)

    for signum in signals:
        signal.signal(signum, note)
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
