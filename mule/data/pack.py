"""Packing: which examples share a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Rows of example indices, each with at most `row_length` positions in all.

    Best-fit decreasing: the longest example first, always into the fullest row that has room.
    Every length must be in 1..row_length. Source: Ding et al. 2024, Fewer Truncations Improve
    Language Modeling (arXiv 2404.10830).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= row_length)
    rows: list[list[int]] = []
    rows_by_space: list[list[int]] = [[] for _ in range(row_length + 1)]
    spaces = 0  # bit s is set while some row has exactly s positions left
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
            rows[row].append(index)
        else:
            row, space = len(rows), row_length
            rows.append([index])
        left = space - length
        if left:
            rows_by_space[left].append(row)
            spaces |= 1 << left
    return rows
