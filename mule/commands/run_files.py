"""What runs are known by while others write them: stamps of their files, and what is kept by them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from mule import locks
from mule.config.dump import read_settings
from mule.run import Run

LOGS = ("metrics.jsonl", "events.jsonl", "samples.jsonl")
_WATCHED = (*LOGS, "recipe.yaml", "resolved.yaml", "latest.json", "best.json", "report.md")
_LOCK = "run.lock"
T = TypeVar("T")
Stamp = tuple[int, ...]


def stamp_of(folder: Path) -> Stamp:
    """Changes whenever a file that tells of the run does, and when a process takes or leaves it."""
    stamp: list[int] = [locks.is_locked(folder / _LOCK)]
    for name in _WATCHED:
        try:
            about = (folder / name).stat()
        except FileNotFoundError:
            stamp.append(-1)
            continue
        stamp += (about.st_ino, about.st_size, about.st_mtime_ns)
    return tuple(stamp)


def settings_of(run: Run) -> dict[str, dict[str, str]]:
    """The resolved settings as they are written, each with its reason; empty before there are any."""
    file = run.folder / "resolved.yaml"
    return read_settings(file.read_text("utf-8", "replace")) if file.is_file() else {}


class Kept(Generic[T]):
    """What `find` says of a run, kept until one of the run's files changes.

    With `share_of_time` what it says of a run that is being written is kept for longer: after each
    look so long that looking takes at most this share of the time.
    """

    def __init__(self, find: Callable[[Run], T], share_of_time: float = 1.0) -> None:
        self._find, self._share = find, share_of_time
        self._kept: dict[Path, tuple[Stamp, float, T]] = {}
        self._locks: dict[Path, threading.Lock] = {}

    def of(self, run: Run) -> T:
        """What is known, found out now where it has to be."""
        with self._locks.setdefault(run.folder, threading.Lock()):
            stamp = stamp_of(run.folder)
            known = self._kept.get(run.folder)
            if known is not None and (known[0] == stamp or self._may_wait(known, stamp)):
                return known[2]
            began = time.monotonic()
            found = self._find(run)
            now = time.monotonic()
            self._kept[run.folder] = (stamp, now + (now - began) / self._share, found)
            return found

    def last(self, run: Run) -> T | None:
        """What was found at the last look, however long ago; None before the first."""
        known = self._kept.get(run.folder)
        return known[2] if known else None

    def is_fresh(self, run: Run) -> bool:
        """Whether `of` has no need to look."""
        known, stamp = self._kept.get(run.folder), stamp_of(run.folder)
        return known is not None and (known[0] == stamp or self._may_wait(known, stamp))

    def _may_wait(self, known: tuple[Stamp, float, Any], stamp: Stamp) -> bool:
        """Whether the run is still written by the one who wrote it then, and was just looked at."""
        is_live = bool(stamp[0]) and stamp[0] == known[0][0]
        return is_live and self._share < 1 and time.monotonic() < known[1]
