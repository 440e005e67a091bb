"""Packing: nothing lost, nothing doubled, rows full, and fast."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mule.data.pack import best_fit


@given(st.lists(st.integers(1, 23), max_size=80))
def test_every_example_once_and_no_row_too_long(lengths: list[int]) -> None:
    rows = best_fit(lengths, 23)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    fills = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(0 < fill <= 23 for fill in fills)
    if len(fills) > 1:  # else two rows could have been one
        assert fills[0] + fills[1] > 23


def test_best_fit_and_not_first_fit() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]
    assert best_fit([], 10) == []


def test_fast_and_full_on_lengths_as_chats_have() -> None:
    generator = np.random.Generator(np.random.Philox(5))
    lengths = np.clip(generator.lognormal(5.3, 0.7, 100_000), 8, 1024).astype(int)
    start = time.perf_counter()
    rows = best_fit(lengths, 1024)
    seconds = time.perf_counter() - start
    assert lengths.sum() / (len(rows) * 1024) >= 0.98
    assert seconds < 1.0
