"""Which conversation lies in which slot of the cache, and what a new one can take over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Slot:
    """One place of the cache. `ids`: the tokens whose keys, values and states it holds.

    `is_long`: they were computed as those of a long text, where that makes a difference.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    is_long: bool = False
    is_busy: bool = False
    used_at: int = 0


class Slots:
    """A fixed number of slots; those of ended answers keep their tokens until they are needed.

    With `whole` a text can only be gone on with where all of what a slot holds is its beginning, as
    of a model with a recurrent state, which is that of the last token.
    """

    def __init__(self, count: int, *, whole: bool = False) -> None:
        self.whole = whole
        self._slots = [Slot(index) for index in range(count)]
        self._clock = 0

    def claim(self, ids: Sequence[int], *, is_long: bool) -> tuple[Slot, Slot, int]:
        """A free slot for a prompt, the slot that holds the longest beginning of it, and its length.

        Both are the same where an answer is continued. The last token of a prompt is always
        computed: its logits are wanted. The caller makes sure that a slot is free.
        """
        source = max(self._slots, key=lambda slot: self._known(slot, ids, is_long))
        num_known = self._known(source, ids, is_long)
        oldest = min(
            (slot for slot in self._slots if not slot.is_busy),
            key=lambda slot: (bool(slot.ids), slot.used_at),
        )
        continues = not source.is_busy and num_known == len(source.ids)
        target = source if num_known and continues else oldest
        self._clock += 1
        target.is_busy, target.used_at = True, self._clock
        target.ids, target.is_long = list(ids[:num_known]), is_long
        return target, source if num_known else target, num_known

    def release(self, slot: Slot, *, spoilt: bool = False) -> None:
        """Its answer has ended; `spoilt`: what it holds cannot be trusted."""
        self._clock += 1
        slot.is_busy, slot.used_at = False, self._clock
        if spoilt:
            slot.ids = []

    def known(self, ids: Sequence[int], *, is_long: bool) -> int:
        """How many tokens at the beginning of `ids` some slot holds."""
        return max(self._known(slot, ids, is_long) for slot in self._slots)

    def _known(self, slot: Slot, ids: Sequence[int], is_long: bool) -> int:
        if slot.is_long != is_long:
            return 0
        common = min(common_length(slot.ids, ids), len(ids) - 1)
        return 0 if self.whole and common < len(slot.ids) else common


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    pairs = enumerate(zip(first, second))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))
