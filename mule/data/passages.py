"""Passages of some items, looked for in many more tokens: runs of 16 tokens, as 64-bit hashes.

It serves leaks (held-out items that were trained on), near duplicates, and answers that repeat
training rows word for word. A run of 16 tokens is some twelve words: about as long as the passages of
Brown et al. 2020, appendix C, and cheap to hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mule.data.clean.shingles import mixed
from mule.data.shards import Shards

RUN_TOKENS = 16
MAX_SCANNED_TOKENS = 16_000_000  # of more, as many are read in even stretches: about a second
MAX_COMPARED_TOKENS = 4_000_000  # with answers, at every evaluation
_STRETCHES = 64
_BLOCK_TOKENS = 1_000_000
_DOUBLINGS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_FILTER_BITS = 22
_FEWEST_RUNS = 8  # an item with fewer of its own is not judged
_SHARE_OF_ITEM = 0.5  # of its runs, found elsewhere: then it is nearly a copy
_COMMON_ITEMS, _COMMON_SHARE = 3, 0.02  # a run in more items is boilerplate: a prompt, a licence


class Copies(NamedTuple):
    """Of `num_judged` items, how many are nearly copies."""

    num_judged: int
    num_copies: int

    @property
    def share(self) -> float:
        return self.num_copies / max(self.num_judged, 1)


def run_hashes(tokens: np.ndarray) -> np.ndarray:
    """The hash of each run of RUN_TOKENS tokens, uint64: none of fewer tokens."""
    found = mixed(tokens.astype(np.uint64) + np.uint64(1))
    for power, factor in enumerate(_DOUBLINGS):
        shift = 1 << power
        found = found[:-shift] * np.uint64(factor) + found[shift:]
    return mixed(found)


class Passages:
    """The runs of `items` (token ids of each), and how often each of them was seen."""

    def __init__(self, items: Sequence[np.ndarray]) -> None:
        hashes = [run_hashes(item) for item in items]
        self._ends = np.cumsum([0, *map(len, hashes)])
        every = np.concatenate([np.zeros(0, np.uint64), *hashes])
        self._known, self._number = np.unique(every, return_inverse=True)
        self._seen = np.zeros(len(self._known), np.int64)
        self._filter = np.zeros(1 << _FILTER_BITS, np.bool_)
        self._filter[self._known & np.uint64((1 << _FILTER_BITS) - 1)] = True

    def look_in(self, tokens: np.ndarray) -> None:
        """Count the runs that stand in `tokens`."""
        if not len(self._known):
            return
        found = run_hashes(tokens)
        found = found[self._filter[found & np.uint64((1 << _FILTER_BITS) - 1)]]
        place = np.minimum(np.searchsorted(self._known, found), len(self._known) - 1)
        hits = place[self._known[place] == found]
        self._seen += np.bincount(hits, minlength=len(self._known))

    def copies(self, items: range, *, least_seen: int) -> Copies:
        """Which of the items have half of their own runs seen so often.

        Runs of many items are nobody's own; an item with few others is not judged.
        """
        own = ~self._common()
        num_judged = num_copies = 0
        for item in items:
            runs = self._number[self._ends[item] : self._ends[item + 1]]
            runs = runs[own[runs]]
            if len(runs) >= _FEWEST_RUNS:
                num_judged += 1
                num_copies += bool((self._seen[runs] >= least_seen).mean() >= _SHARE_OF_ITEM)
        return Copies(num_judged, num_copies)

    def seen(self, item: int) -> np.ndarray:
        """How often each run of an item was seen, in order."""
        return self._seen[self._number[self._ends[item] : self._ends[item + 1]]]

    def _common(self) -> np.ndarray:
        num_items = len(self._ends) - 1
        in_items = np.zeros(len(self._known), np.int64)
        for start, end in pairwise(self._ends):
            in_items[np.unique(self._number[start:end])] += 1
        return in_items > max(_COMMON_ITEMS, _COMMON_SHARE * num_items)


def copied_stretches(shards: Shards, answers: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """The longest stretch of each answer that stands in the rows, and how often: (tokens, times).

    (0, 0) of one without a run that does. Of much data a part is read, as `stretches` does.
    """
    passages = Passages(answers)
    if any(len(answer) >= RUN_TOKENS for answer in answers):
        for tokens in stretches(shards, MAX_COMPARED_TOKENS):
            passages.look_in(tokens)
    return [_longest(passages.seen(number)) for number in range(len(answers))]


def _longest(seen: np.ndarray) -> tuple[int, int]:
    edges = np.flatnonzero(np.diff(seen > 0, prepend=False, append=False))
    if not len(edges):
        return 0, 0
    starts, ends = edges[::2], edges[1::2]
    best = int(np.argmax(ends - starts))
    times = int(seen[starts[best] : ends[best]].min())
    return int(ends[best] - starts[best]) + RUN_TOKENS - 1, times


def stretches(shards: Shards, max_tokens: int = MAX_SCANNED_TOKENS) -> Iterator[np.ndarray]:
    """All tokens of prepared rows in blocks, or of more than `max_tokens` even stretches of them.

    Blocks overlap by all but one token of a run, so that each run is in one of them.
    """
    share = min(1.0, max_tokens / max(shards.num_tokens, 1))
    for part in shards.parts:
        count = len(part.tokens)
        cuts = 1 if share == 1 else _STRETCHES
        for cut in range(cuts):
            first, end = cut * count // cuts, (cut + 1) * count // cuts
            end = first + int((end - first) * share)
            for start in range(first, end, _BLOCK_TOKENS):
                yield part.tokens[start : min(start + _BLOCK_TOKENS + RUN_TOKENS - 1, end)]


def some_items(shards: Shards, most: int, max_tokens: int) -> list[np.ndarray]:
    """The beginnings of at most `most` documents or examples, evenly spread, as tokens."""
    items = [
        (part, number) for part in shards.parts for number in _spread(len(part.offsets) - 1, most)
    ]
    chosen = [items[place] for place in _spread(len(items), most)]
    spans = ((part, *part.offsets[number : number + 2].tolist()) for part, number in chosen)
    return [part.tokens[start : min(end, start + max_tokens)] for part, start, end in spans]


def _spread(count: int, most: int) -> range:
    return range(0, count, max(1, -(-count // most)))
