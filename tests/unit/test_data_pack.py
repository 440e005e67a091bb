"""Packing: nothing lost, nothing doubled, rows full, and fast."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mule.data.pack import best_fit


def _rows(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    order, starts = best_fit(lengths, row_length)
    assert starts[0] == 0 and starts[-1] == len(order)
    return [order[a:b].tolist() for a, b in pairwise(starts)]


def _one_by_one(lengths: list[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing as the books have it; of equally full rows, the one last touched."""
    rows: list[list[int]] = []  # the last touched at the end
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rooms = [row_length - sum(lengths[i] for i in row) for row in rows]
        fitting = [(-room, place) for place, room in enumerate(rooms) if room >= lengths[index]]
        rows.append([*(rows.pop(max(fitting)[1]) if fitting else []), index])
    return rows


@given(st.lists(st.integers(1, 23), max_size=80))
def test_every_example_once_and_no_row_too_long(lengths: list[int]) -> None:
    rows = _rows(lengths, 23)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    fills = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(0 < fill <= 23 for fill in fills)
    if len(fills) > 1:  # else two rows could have been one
        assert fills[0] + fills[1] > 23
    expected = _one_by_one(lengths, 23)
    assert sorted(sorted(lengths[i] for i in row) for row in rows) == sorted(
        sorted(lengths[i] for i in row) for row in expected
    )


def test_best_fit_and_not_first_fit() -> None:
    assert _rows([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert _rows([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]
    assert _rows([], 10) == []


def test_fast_and_full_on_lengths_as_chats_have() -> None:
    generator = np.random.Generator(np.random.Philox(5))
    lengths = np.clip(generator.lognormal(5.3, 0.7, 1_000_000), 8, 1024).astype(int)
    start = time.perf_counter()
    order, starts = best_fit(lengths, 1024)
    seconds = time.perf_counter() - start
    assert len(order) == 1_000_000
    assert lengths.sum() / ((len(starts) - 1) * 1024) >= 0.98
    assert seconds < 3.0
