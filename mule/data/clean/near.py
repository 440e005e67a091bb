"""Near-duplicates: texts that share most of their runs of five words.

MinHash finds the candidates, and every candidate is verified by the exact Jaccard index of the two
sets of shingles. Source: Broder 1997, On the resemblance and containment of documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rensa import RMinHash  # type: ignore[missing-module-attribute]  (compiled, no types)

from mule import progress
from mule.data.clean.exact import duplicates
from mule.data.clean.groups import Groups
from mule.data.clean.shingles import Shingler
from mule.errors import UserError

SHINGLE_WORDS = 5
_NUM_HASHES = 128  # in a signature: the estimate of a Jaccard index of 0.8 is right within 0.035
_WANTED_RECALL = 0.99  # of a pair that is exactly at the threshold
_BATCH_TEXTS = 4096
_NEIGHBOURS = 16  # members of a bucket each member is compared with, besides the first


def near_duplicates(
    texts: Sequence[str], *, threshold: float = 0.8, seed: int = 0
) -> list[list[int]]:
    """Groups of texts joined by pairs whose Jaccard index is at least `threshold`.

    Each group has at least two indices, ascending; the first is the one to keep. Exact duplicates
    belong to it. Shingles are runs of five words in lower case, of characters where a script has
    no spaces; a text of fewer than five words is only like one with the same words. A pair at the
    threshold is found with a probability of 99%, a pair below it never. Time and memory grow with
    the number of texts, however many are alike: 0.5 KB for each, and the shingles of candidates.
    Raises UserError for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise UserError(
            f"the threshold of near-duplicates is {threshold:g}", "give one above 0, at most 1"
        )
    equal = duplicates(texts)
    repeated = {index for group in equal for index in group[1:]}
    distinct = [index for index in range(len(texts)) if index not in repeated]
    search = _Search([texts[index] for index in distinct], threshold, seed)
    similar = Groups(len(texts))
    similar.join_all(equal)
    similar.join_all([[distinct[number] for number in group] for group in search.groups()])
    return similar.members(at_least=2)


def bands(threshold: float) -> tuple[int, int]:
    """(number, rows) of the bands: the most rows that keep the wanted recall at `threshold`.

    A pair with Jaccard index j shares a band with probability 1 - (1 - j^rows)^number. Source:
    Leskovec et al., Mining of Massive Datasets, 3.4.2.
    """
    for rows in range(_NUM_HASHES, 1, -1):
        number = _NUM_HASHES // rows
        if 1 - (1 - threshold**rows) ** number >= _WANTED_RECALL:
            return number, rows
    return _NUM_HASHES, 1


class _Search:
    """The pairs among texts that all differ."""

    def __init__(self, texts: list[str], threshold: float, seed: int) -> None:
        self._texts, self._threshold = texts, threshold
        self._shingler = Shingler(SHINGLE_WORDS, symbols=True)
        self._signatures = self._sign(seed)
        self._groups = Groups(len(texts))
        self._sets: dict[int, np.ndarray] = {}  # of candidates only
        self._unlike: set[int] = set()  # pairs verified before, as one number each
        # Three standard deviations: one true pair in 700 is lost, most false ones are.
        self._least_equal = threshold - 3 * (threshold * (1 - threshold) / _NUM_HASHES) ** 0.5

    def groups(self) -> list[list[int]]:
        """Bands are compared one after another; pairs already joined are not looked at again."""
        number, rows = bands(self._threshold)
        whole = _hashed(self._signatures)
        with progress.task("Comparing candidates", total=number) as bar:
            for start in range(0, number * rows, rows):
                self._compare_band(_hashed(self._signatures[:, start : start + rows]), whole)
                bar.advance()
        return self._groups.members(at_least=2)

    def _sign(self, seed: int) -> np.ndarray:
        """The signatures, (texts, hashes) uint32."""
        signatures = np.empty((len(self._texts), _NUM_HASHES), np.uint32)
        with progress.task("Hashing", total=len(self._texts), unit="texts") as bar:
            for start in range(0, len(self._texts), _BATCH_TEXTS):
                batch = self._texts[start : start + _BATCH_TEXTS]
                flat, offsets = self._shingler.hashes(batch)
                matrix = RMinHash.digest_matrix_from_flat_token_hashes(
                    flat, offsets.astype(np.uint64), _NUM_HASHES, seed
                )
                signatures[start : start + len(batch)] = matrix.to_rows()
                bar.advance(len(batch))
        return signatures

    def _compare_band(self, keys: np.ndarray, whole: np.ndarray) -> None:
        """Compare each member of a bucket with its first, then with its next neighbours.

        A bucket of n texts costs n comparisons when they are all alike, and never n x n. Equal
        signatures are neighbours, so that a group inside a large bucket is found as well.
        """
        order = np.lexsort((whole, keys))
        place = np.arange(len(order))
        begins = np.ones(len(order), bool)
        begins[1:] = keys[order[1:]] != keys[order[:-1]]
        first = np.maximum.accumulate(np.where(begins, place, 0))
        self._join(order[first[~begins]], order[place[~begins]])
        later = place[place - 1 > first]  # the first was compared above
        for shift in range(1, _NEIGHBOURS + 1):
            later = later[later - shift > first[later]]
            if not later.size:
                break
            self._join(order[later - shift], order[later])

    def _join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Join the pairs that are alike; a pair is one element of each."""
        apart = self._groups.find_all(left) != self._groups.find_all(right)
        left, right = left[apart], right[apart]
        for start in range(0, len(left), _BATCH_TEXTS):
            a, b = left[start : start + _BATCH_TEXTS], right[start : start + _BATCH_TEXTS]
            equal = (self._signatures[a] == self._signatures[b]).mean(axis=1)
            likely = equal >= self._least_equal
            self._verify(a[likely].tolist(), b[likely].tolist())

    def _verify(self, left: list[int], right: list[int]) -> None:
        self._make_sets({*left, *right})
        for a, b in zip(left, right):
            pair = min(a, b) * len(self._texts) + max(a, b)
            if pair in self._unlike or self._groups.find(a) == self._groups.find(b):
                continue
            if jaccard(self._sets[a], self._sets[b]) >= self._threshold:
                self._groups.join(a, b)
            else:
                self._unlike.add(pair)

    def _make_sets(self, numbers: set[int]) -> None:
        missing = sorted(numbers - self._sets.keys())
        sets = self._shingler.sets([self._texts[number] for number in missing]) if missing else []
        self._sets.update(zip(missing, sets))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared elements over all elements of two sorted sets."""
    shared = np.intersect1d(a, b, assume_unique=True).size
    return shared / (a.size + b.size - shared)


def _hashed(rows: np.ndarray) -> np.ndarray:
    """One 64-bit number for each row; equal rows have equal ones."""
    factors = np.random.Philox(key=[rows.shape[1], 1]).random_raw(rows.shape[1]) | np.uint64(1)
    return rows.astype(np.uint64) @ factors
