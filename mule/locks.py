"""Locks among processes: the system lets go of one when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mule.fsio import explain_storage


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold `path` as a lock; `on_wait` is called once if another process has it.

    The file goes at the end.
    """
    descriptor = _take_lock(path, on_wait)
    try:
        yield
    finally:
        try:
            with explain_storage(path):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock; a killed one leaves the file, but not the lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take_lock(path: Path, on_wait: Callable[[], None]) -> int:
    with explain_storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        told = False
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    on_wait()
                told = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # the process before removed this file: take the new one


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still is the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
