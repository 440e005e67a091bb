"""Packing: which examples share a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(order, starts): row r has the examples order[starts[r] : starts[r + 1]], longest first.

    Best-fit decreasing: the longest example first, always into the fullest row that has room.
    Every length must be in 1..row_length. Source: Ding et al. 2024, Fewer Truncations Improve
    Language Modeling (arXiv 2404.10830).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= row_length)
    longest_first = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), dtype=np.int64)  # of the examples, longest first
    rows = _Rows(row_length)
    first = 0
    for length, count in zip(*_runs(lengths[longest_first]), strict=True):
        # Best fit puts equal examples into one row until it is full, then into the next: a whole
        # group of rows with equal room is filled at once.
        end = first + count
        while first < end:
            chosen = rows.take(length, end - first)
            row_of[first : first + len(chosen)] = chosen
            first += len(chosen)
    order = longest_first[np.argsort(row_of, kind="stable")]
    return order, np.searchsorted(np.sort(row_of), np.arange(rows.count + 1))


class _Rows:
    """Rows by the room they have left."""

    def __init__(self, row_length: int) -> None:
        self.count = 0
        self._row_length = row_length
        self._by_space: dict[int, list[int]] = {}
        self._spaces = 0  # bit s is set while some row has exactly s positions left

    def take(self, length: int, count: int) -> np.ndarray:
        """The rows of at most `count` examples of this length, by best fit."""
        fitting = self._spaces >> length
        if not fitting:
            space = self._row_length
            per_row = space // length
            num_rows = -(-count // per_row)
            rows = list(range(self.count, self.count + num_rows))
            self.count += num_rows
        else:
            space = length + (fitting & -fitting).bit_length() - 1
            per_row = space // length
            same = self._by_space[space]
            rows = [same.pop() for _ in range(min(len(same), -(-count // per_row)))]
            if not same:
                self._spaces ^= 1 << space
        chosen = np.repeat(rows, per_row)[:count]
        for row in rows[:-1]:
            self._put(row, space - per_row * length)
        self._put(rows[-1], space - (len(chosen) - per_row * (len(rows) - 1)) * length)
        return chosen

    def _put(self, row: int, space: int) -> None:
        if space:
            self._by_space.setdefault(space, []).append(row)
            self._spaces |= 1 << space


def _runs(values: np.ndarray) -> tuple[list[int], list[int]]:
    """Each value of a sorted array, and how often it stands there."""
    starts = np.flatnonzero(np.diff(values, prepend=0))
    return values[starts].tolist(), np.diff(starts, append=len(values)).tolist()
