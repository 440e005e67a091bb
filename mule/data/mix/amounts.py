"""How many rows of each source: caps, repeats, weights, and the limit of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mule.errors import UserError


@dataclass(frozen=True)
class Amount:
    """Of one source: `available` items; `capped` of them may be used, `rows` rows are made.

    `weighted` is the number of rows before the limit of all was applied.
    """

    available: int
    capped: int
    weighted: int
    rows: int

    def left_out(self) -> dict[str, int]:
        """Items of which no row is made, by reason."""
        by_weight = min(self.capped, self.weighted)
        used = min(self.capped, self.rows)
        return {
            "cap": self.available - self.capped,
            "weight": self.capped - by_weight,
            "limit": by_weight - used,
        }

    def copies(self) -> list[int]:
        """The rows made of each item, in the order drawn: as even as can be."""
        if not self.capped:
            return [0] * self.available
        whole, more = divmod(self.rows, self.capped)
        used = [whole + (place < more) for place in range(self.capped)]
        return used + [0] * (self.available - self.capped)


def amounts(
    available: Sequence[int],
    *,
    caps: Mapping[int, int],
    repeats: Mapping[int, int],
    weights: Mapping[int, float],
    max_examples: int | None,
) -> list[Amount]:
    """The amount of each source; the mappings are by its number. Raises UserError.

    Weights are shares of the result: the source that is scarcest for its share is used whole, and
    of the others as much as fits beside it. Sources without a weight divide what the weights leave
    of 1 by their sizes.
    """
    capped = [min(count, caps.get(n, count)) for n, count in enumerate(available)]
    rows = [count * repeats.get(n, 1) for n, count in enumerate(capped)]
    weighted = _weighted(rows, weights) if weights else rows
    limited = weighted
    if max_examples is not None and sum(weighted) > max_examples:
        total = sum(weighted)
        limited = apportion([count * max_examples / total for count in weighted], max_examples)
    return [Amount(*counts) for counts in zip(available, capped, weighted, limited)]


def apportion(exact: Sequence[float], total: int) -> list[int]:
    """Whole numbers near `exact` that add up to `total`, by the largest remainders."""
    found = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda n: (found[n] - exact[n], n))
    for number in order[: total - sum(found)]:
        found[number] += 1
    return found


def _weighted(rows: Sequence[int], weights: Mapping[int, float]) -> list[int]:
    shares = _shares(rows, weights)
    total = min(count / share for count, share in zip(rows, shares) if share and count)
    return [min(count, round(total * share)) for count, share in zip(rows, shares)]


def _shares(rows: Sequence[int], weights: Mapping[int, float]) -> list[float]:
    """The share of the result of each source; they add up to 1."""
    others = sum(count for number, count in enumerate(rows) if number not in weights)
    named = sum(weights.values())
    left = 0.0
    if others:
        left = 1 - named
        if left <= 0:
            raise UserError(
                f"the weights add up to {named:g}, and sources without one have nothing left",
                "give every source a weight, or weights that add up to less than 1",
            )
    whole = named + left
    return [
        weights[number] / whole if number in weights else left * count / max(1, others)
        for number, count in enumerate(rows)
    ]
