"""Which published setups are nearest to one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from mule.compare.parameters import BY_KEY
from mule.compare.sourced import Kind, Setup
from mule.message import Message, joined

# parameter -> how much a factor of ten counts
_WEIGHTS: dict[str, float] = {
    "parameters": 1.0,
    "rows": 0.8,
    "trained_tokens": 0.5,
    "learning_rate": 0.4,
    "epochs": 0.3,
    "batch_rows": 0.3,
}
_MOST_DECADES = 2.0  # further apart is simply far
_UNKNOWN = 1.0  # decades that an unknown value counts


def related_kinds(yours: Setup) -> tuple[Kind, ...]:
    """The kinds that data, length and updates are alike in: an adapter learns as a fine-tune does."""
    return ("adapter", "fine-tune") if yours.kind == "adapter" else (yours.kind,)


def references(yours: Setup, setups: Iterable[Setup], *, kinds: Sequence[Kind] = ()) -> list[Setup]:
    """The published setups of the same kind, or of `kinds`; never the setup itself."""
    wanted = kinds or (yours.kind,)
    return [
        setup
        for setup in setups
        if setup.origin == "published"
        and setup.kind in wanted
        and (setup.name, setup.origin) != (yours.name, yours.origin)
    ]


def nearest(yours: Setup, setups: Iterable[Setup], count: int = 3) -> list[Setup]:
    """The `count` published setups of the same kind that are nearest, first the nearest."""
    found = references(yours, setups)
    return sorted(found, key=lambda other: (distance(yours, other), other.name))[:count]


def distance(yours: Setup, other: Setup) -> float:
    """Weighted decades between the two, over what is known of yours."""
    total = weights = 0.0
    for key, weight in _WEIGHTS.items():
        one, two = yours.number(key), other.number(key)
        if not one:
            continue
        apart = min(abs(math.log10(one / two)), _MOST_DECADES) if two else _UNKNOWN
        total, weights = total + weight * apart, weights + weight
    return total / weights if weights else math.inf


def why_near(yours: Setup, other: Setup) -> str:
    """What the two have alike, in words: every known quantity within a factor of three."""
    alike = []
    for key in _WEIGHTS:
        one, two = yours.number(key), other.number(key)
        if one and two and abs(math.log10(one / two)) <= math.log10(3):
            alike.append(
                Message("{} {} and {}", BY_KEY[key].label, yours.shown(key), other.shown(key))
            )
    return joined("; ", alike) or Message("the same kind of training, and nothing else alike")
