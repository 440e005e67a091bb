"""Dividing items into training and validation, so that neither knows the other's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from mule.data.clean.compare import TrainingItem, prompt_text, said_text
from mule.data.clean.exact import duplicates, groups_of_equals
from mule.data.clean.groups import Groups
from mule.data.clean.shingles import words
from mule.errors import UserError

_SMALL = ""  # the stratum of all that are too small for one of their own
_ROUNDING = 1e-9


def related(items: Sequence[TrainingItem], similar: Iterable[Sequence[int]]) -> list[list[int]]:
    """Groups of items that must stay together: equal, in a group of `similar`, or asked the same.

    Every item is in one group; most are alone. Asked the same: the first questions of two
    conversations have the same words.
    """
    together = Groups(len(items))
    together.join_all(similar)
    together.join_all(duplicates(map(said_text, items)))
    questions = [prompt_text(item) for item in items]
    together.join_all(
        groups_of_equals(
            number if question is None else " ".join(words(question, symbols=True)) or question
            for number, question in enumerate(questions)
        )
    )
    return together.members()


def split(
    groups: Sequence[Sequence[int]], strata: Sequence[str], *, share: float, seed: int
) -> tuple[list[int], list[int]]:
    """(train, valid): ascending indices; `groups` go whole, `strata` names the part of each index.

    About `share` of every stratum is held out (a group belongs to that of its first member), at
    least one item and never all of it; those with fewer than 1 / share items count as one stratum.
    The share of all is met within the size of one group, where the strata have enough of them.
    Raises UserError when one side would be empty.
    """
    draw = _Draw(groups, strata, share, seed)
    for stratum in sorted(draw.waiting):
        draw.take_one(stratum)
    for stratum in sorted(draw.waiting):
        draw.fill(stratum)
    draw.top_up()
    held = frozenset(index for group in draw.held for index in group)
    if not held:
        items = f"{len(strata):,} item{'s' * (len(strata) != 1)}"
        parts = f"{len(groups):,} group{'s' * (len(groups) != 1)}"
        raise UserError(
            f"nothing can be held out for validation: {items} in {parts} that must stay whole",
            "add other data, or use --valid-share 0 for none; of one long text, data.valid_share in "
            "the recipe holds out the end",
        )
    return [index for index in range(len(strata)) if index not in held], sorted(held)


class _Draw:
    """Groups in an order drawn by seed, and those held out so far."""

    def __init__(
        self, groups: Sequence[Sequence[int]], strata: Sequence[str], share: float, seed: int
    ) -> None:
        self.waiting: dict[str, dict[int, Sequence[int]]] = {}  # by the number of the group
        self.held: list[Sequence[int]] = []
        self._missing = share * len(strata)  # items still to be held out
        self._wanted: dict[str, float] = {}  # of each stratum
        keys = np.random.Philox(key=[seed, 0]).random_raw(len(groups))
        sizes = Counter(strata)
        for number in np.argsort(keys, kind="stable").tolist():
            group = groups[number]
            stratum = strata[group[0]]
            if share * sizes[stratum] < 1 - _ROUNDING:
                stratum = _SMALL
            self.waiting.setdefault(stratum, {})[number] = group
            self._wanted[stratum] = self._wanted.get(stratum, _ROUNDING) + share * len(group)

    def take_one(self, stratum: str) -> None:
        """The first group that fits into the stratum's share, or else the smallest."""
        if self._wanted[stratum] < 1:
            return
        waiting, wanted = self.waiting[stratum], self._wanted[stratum]
        fitting = (number for number, group in waiting.items() if len(group) <= wanted)
        smallest = min(waiting, key=lambda number: len(waiting[number]))
        self._hold(stratum, next(fitting, smallest))

    def fill(self, stratum: str) -> None:
        """The groups that fit into what is left of the stratum's share."""
        for number, group in list(self.waiting[stratum].items()):
            if len(group) <= self._wanted[stratum]:
                self._hold(stratum, number)

    def top_up(self) -> None:
        """What all the roundings left over: small groups first, from every stratum in turn."""
        order = sorted(
            (len(group), place, stratum, number)
            for stratum, waiting in self.waiting.items()
            for place, (number, group) in enumerate(waiting.items())
        )
        for size, _, stratum, number in order:
            if size / 2 <= self._missing or not self.held:
                self._hold(stratum, number)

    def _hold(self, stratum: str, number: int) -> None:
        """Hold a group out, unless the stratum would have nothing left to train on."""
        if len(self.waiting[stratum]) > 1:
            group = self.waiting[stratum].pop(number)
            self.held.append(group)
            self._missing -= len(group)
            self._wanted[stratum] -= len(group)
