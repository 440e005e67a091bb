"""Stopping on request: the first SIGINT or SIGTERM is noted, the second acts at once.

Among several processes a signal to any of them stops all after the same update, and a second one
changes nothing: torchrun passes on what the terminal sent already, and kills what stays too long.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # the first that was sent to anyone counts


class StopRequest:
    """`noted` is the signal this process got, `signum` the one the run stops for, or None."""

    noted: int | None = None
    signum: int | None = None

    def votes(self) -> list[float]:
        """One number for each signal, to be summed over the processes."""
        return [float(self.noted == signum) for signum in _SIGNALS]

    def agree(self, votes: Sequence[float]) -> None:
        """Stop for what any process noted; `votes` are the sums."""
        self.signum = next((s for s, count in zip(_SIGNALS, votes) if count), None)


@contextlib.contextmanager
def stop_on_signal(*, alone: bool = True) -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM inside the block, so that the loop can save and leave.

    `alone` means that there is nobody to agree with.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return
    previous = {signum: signal.getsignal(signum) for signum in _SIGNALS}

    def note(signum: int, _frame: FrameType | None) -> None:
        request.noted = signum
        if alone:
            request.signum = signum
            for known, handler in previous.items():
                signal.signal(known, handler)

    for signum in _SIGNALS:
        signal.signal(signum, note)
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
