"""Exact duplicates: texts that are equal but for their white space."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from hashlib import blake2b

_KEY_BYTES = 16  # two different texts with the same key: never in practice, even of 10^15 texts


def duplicates(texts: Iterable[str]) -> list[list[int]]:
    """Groups of equal texts: ascending indices, at least two; the first is the one to keep.

    Equal means equal after trimming and after making one space of every run of white space.
    Capitals, accents and punctuation count: near-duplicates are another question.
    """
    return groups_of_equals(_key(text) for text in texts)


def groups_of_equals(keys: Iterable[Hashable]) -> list[list[int]]:
    """Groups of indices with equal keys, as `duplicates` gives them."""
    found: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return [group for group in found.values() if len(group) > 1]


def _key(text: str) -> bytes:
    plain = " ".join(text.split()).encode(errors="surrogatepass")
    return blake2b(plain, digest_size=_KEY_BYTES).digest()
