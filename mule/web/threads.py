"""Work beside the event loop, which does not hold up the end of the server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(call: Callable[[], T]) -> T:
    """What `call` gives or raises, computed in a thread of its own.

    The thread is a daemon: a plan or a look at data that is under way when the server ends is given
    up with it. Nothing is half written by that, since what is written goes through fsio.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[Any], None], value: object) -> None:
        def settled() -> None:
            if not done.done():  # whoever waited may have left
                settle(value)

        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(settled)

    def compute() -> None:
        try:
            tell(done.set_result, call())
        except BaseException as error:
            tell(done.set_exception, error)

    threading.Thread(target=compute, daemon=True, name="mule ui").start()
    return await done
