"""Work beside the event loop: its result, its error, and that it holds nobody up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from mule.web.threads import in_thread


def test_results_and_errors_come_back() -> None:
    assert asyncio.run(in_thread(lambda: 2 + 3)) == 5
    assert asyncio.run(in_thread(lambda: threading.current_thread().daemon))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_thread(lambda: 1 // 0))


def test_who_leaves_is_not_told() -> None:
    go_on, ended = threading.Event(), threading.Event()

    def call() -> None:
        go_on.wait(30)
        ended.set()

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_thread(call), 0.05)
        go_on.set()
        await asyncio.sleep(0.1)

    asyncio.run(leave())
    assert ended.wait(30)


_ENDS = """
import asyncio, time
from mule.web.threads import in_thread
async def main():
    asyncio.ensure_future(in_thread(lambda: time.sleep(600)))
    await asyncio.sleep(0.1)
asyncio.run(main())
"""


def test_a_process_ends_while_it_computes() -> None:
    assert subprocess.run([sys.executable, "-c", _ENDS], timeout=60, check=False).returncode == 0
