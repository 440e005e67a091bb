"""Groups that grow together: union-find over the numbers 0..n-1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class Groups:
    """Every number begins alone; `join` makes one group of two."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size)

    def find(self, number: int) -> int:
        """The smallest number of the group."""
        parent = self._parent
        while (above := parent[number]) != number:
            parent[number] = number = parent[above]
        return int(number)

    def find_all(self, numbers: np.ndarray) -> np.ndarray:
        """The smallest number of the group of each."""
        roots = self._parent[numbers]
        while (above := self._parent[roots] != roots).any():
            roots[above] = self._parent[roots[above]]
        self._parent[numbers] = roots  # a shorter way for the next time
        return roots

    def join(self, a: int, b: int) -> None:
        low, high = sorted((self.find(a), self.find(b)))
        self._parent[high] = low

    def join_all(self, groups: Iterable[Sequence[int]]) -> None:
        """Join the members of each group."""
        for group in groups:
            for other in group[1:]:
                self.join(group[0], other)

    def members(self, at_least: int = 1) -> list[list[int]]:
        """The groups of `at_least` members: ascending, in the order of their first member."""
        found: dict[int, list[int]] = {}
        for number, root in enumerate(self.find_all(np.arange(len(self._parent))).tolist()):
            found.setdefault(root, []).append(number)
        return [group for group in found.values() if len(group) >= at_least]
