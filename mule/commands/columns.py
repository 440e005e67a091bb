"""The figures of a run as columns of numbers, kept up with its log while it grows.

A hundred thousand updates are read once; what a live run adds is read from where the log ended. Only
what a resumed or rolled back run takes back has everything read again.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

from mule import logs
from mule.run import Run

Axis = Literal["steps", "tokens", "seconds", "hours"]
AXES: dict[Axis, str] = {
    "steps": "updates",
    "tokens": "trained tokens",
    "seconds": "seconds of training",
    "hours": "hours of training",
}
_PACE_ROWS = 200  # the newest rows, whose pace tells where an update to come will lie
_BY = ("val_loss_by", "val_loss_by_category")  # losses of parts of what was held out, in one row
_NO_FIGURES = {
    "at",
    "attempt",
    "step",
    "epoch",
    "num_targets",
    "steps_per_second",
    "moe",
    "devices",
}
_NUMBERS = {float, int}
_MOST_KEPT = 8  # runs; 100,000 updates take about 30 MB
T = TypeVar("T")


class Column:
    """A figure where it was logged: the row of each value, the values, and their sums so far."""

    def __init__(self) -> None:
        self.rows = array("q")
        self.values = array("d")
        self.sums = array("d", [0.0])

    def __len__(self) -> int:
        return len(self.rows)

    def extend(self, rows: Sequence[int], values: Sequence[float]) -> None:
        """Add values behind those that are there."""
        self.rows.extend(rows)
        self.values.extend(values)
        self.sums.extend(_running(self.sums, values))

    def means(self, first: int, end: int, window: int) -> list[float]:
        """The mean of the last `window` values at each place from `first` to before `end`."""
        sums, split = self.sums, min(max(first, window), end)
        start = [(sums[place + 1] - sums[0]) / (place + 1) for place in range(first, split)]
        later = zip(sums[split + 1 : end + 1], sums[split + 1 - window : end + 1 - window])
        return start + [(now - before) / window for now, before in later]


class Columns:
    """Every figure of a run's rows that stand, and where each row lies on the axes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._clear()

    def __len__(self) -> int:
        return len(self.steps)

    def refresh(self) -> Columns:
        """Read what was added to the log since the last time; itself."""
        file = self.run.folder / "metrics.jsonl"
        about = file.stat() if file.is_file() else None
        events = self.run.events()
        begun = [e for e in events if e["kind"] in ("started", "rolled back")]
        is_other = about is None or about.st_ino != self._inode or about.st_size < self._end
        if is_other or begun != self._begun:
            self._clear()
            self._begun, self._inode = begun, about.st_ino if about else 0
        added, end = logs.read_log_from(file, self._end)
        if self.steps and any(row["step"] <= self.steps[-1] for row in added):
            self._end = 0  # an update stands there anew: the whole log says which row counts
            self._clear_columns()
            added, end = logs.read_log_from(file, 0)
        self._end = end
        self._add(self.run.standing(added) if added else [])
        return self

    def along(self, axis: Axis) -> Sequence[float]:
        """Where each row lies on an axis; hours as seconds are, times 3600."""
        return {"steps": self.steps, "tokens": self.tokens}.get(axis, self.seconds)

    def place_of(self, step: int) -> int:
        """The row of an update, or of the first one logged after it."""
        return min(bisect_left(self.steps, step), len(self.steps) - 1)

    def position(self, step: int, axis: Axis) -> float:
        """Where an update lies on an axis; one to come at the pace of the newest rows."""
        x, last = self.along(axis), self.steps[-1]
        if step <= last:
            return x[self.place_of(step)]
        before = max(0, len(self.steps) - _PACE_ROWS)
        passed = last - self.steps[before]
        pace = (x[-1] - x[before]) / passed if passed else x[-1] / max(1, last)
        return x[-1] + pace * (step - last)

    # ------------------------------------------------------------ inside

    def _clear(self) -> None:
        self._inode, self._end = 0, 0
        self._begun: list[dict[str, Any]] = []
        self._clear_columns()

    def _clear_columns(self) -> None:
        self.steps, self.tokens, self.seconds = array("d"), array("d"), array("d")
        self.figures: dict[str, Column] = {}
        self._last = (0, 0.0)  # attempt and time of the newest row

    def _add(self, rows: list[dict[str, Any]]) -> None:
        started = {e["attempt"]: e["at"] for e in self._begun if e["kind"] == "started"}
        first = len(self.steps)
        took = []
        for row in rows:
            attempt, at = row["attempt"], row["at"]
            before = self._last[1] if attempt == self._last[0] else started.get(attempt, at)
            took.append(max(0.0, at - before))
            self._last = (attempt, at)
        self.steps.extend([row["step"] for row in rows])
        self.tokens.extend(_running(self.tokens, [row.get("num_targets") or 0 for row in rows]))
        self.seconds.extend(_running(self.seconds, took))
        for name in sorted(set().union(*rows) - _NO_FIGURES):
            if name in _BY:
                for part in dict.fromkeys(part for row in rows for part in row.get(name) or ()):
                    self._extend(
                        f"{name}.{part}", first, [(r.get(name) or {}).get(part) for r in rows]
                    )
            else:
                self._extend(name, first, [row.get(name) for row in rows])

    def _extend(self, name: str, first: int, values: list[Any]) -> None:
        """Add the numbers among the values, which are those of the rows from `first`."""
        rows: Sequence[int] = range(first, first + len(values))
        if not set(map(type, values)) <= _NUMBERS:
            rows = [row for row, value in zip(rows, values) if type(value) in _NUMBERS]
            values = [value for value in values if type(value) in _NUMBERS]
        if values:
            self.figures.setdefault(name, Column()).extend(rows, values)


def _running(before: Sequence[float], added: Sequence[float]) -> list[float]:
    """The sums that go on behind those before."""
    return list(accumulate(added, initial=before[-1] if before else 0.0))[1:]


class ColumnStore:
    """The columns of the runs that were looked at last, for several threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, tuple[threading.Lock, Columns]] = OrderedDict()
        self._lock = threading.Lock()

    def use(self, run: Run, call: Callable[[Columns], T]) -> T:
        """What `call` makes of the run's columns as they are now."""
        with self._lock:
            if run.folder not in self._kept:
                self._kept[run.folder] = (threading.Lock(), Columns(run))
            self._kept.move_to_end(run.folder)
            lock, columns = self._kept[run.folder]
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        with lock:
            return call(columns.refresh())
