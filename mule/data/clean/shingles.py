"""Words of a text, and the hashes of every run of n words (its shingles)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise

import numpy as np

# Scripts written without spaces (Thai, Lao, Burmese, Khmer, kana, Chinese): a character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003134f"
)
_MARKS = "\u0300-\u036f\u0900-\u0dff"  # accents and Indic vowel signs belong to their word
_WORD = rf"[{_UNSPACED}]|(?:[^\W{_UNSPACED}]|[{_MARKS}])+"
_SYMBOL = r"[-+*/=<>^%&|~@#$€£]"  # 3 + 4 is not 3 - 4
_WORDS = re.compile(_WORD)
_WORDS_AND_SYMBOLS = re.compile(f"{_WORD}|{_SYMBOL}")
_ASCII_WORDS = re.compile(r"\w+", re.ASCII)
_ASCII_WORDS_AND_SYMBOLS = re.compile(rf"\w+|{_SYMBOL}", re.ASCII)

_MOST_WORDS_KEPT = 2_000_000  # hashes kept for words seen before: about 300 MB
_MASK = 2**64 - 1


def words(text: str, *, symbols: bool = False) -> list[str]:
    """The words of a text in lower case, without punctuation; `symbols` keeps + - = $ and so on."""
    if text.isascii():
        return (_ASCII_WORDS_AND_SYMBOLS if symbols else _ASCII_WORDS).findall(text.lower())
    return (_WORDS_AND_SYMBOLS if symbols else _WORDS).findall(text.casefold())


class Shingler:
    """Turns texts into hashes of their runs of `length` words.

    A text with fewer words is one shingle, and one without any word is hashed as it is: every text
    has at least one. Equal runs have equal 64-bit hashes in every process and on every machine.
    """

    def __init__(self, length: int, *, symbols: bool = False) -> None:
        self.length = length
        self._symbols = symbols
        self._hashes = _WordHashes()
        draw = np.random.Philox(key=[length, 0]).random_raw(length)
        self._factors = draw | np.uint64(1)

    def hashes(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All shingles, repeated ones too (uint64); the n-th text has [offsets[n], offsets[n+1])."""
        rows = [self._word_hashes(text) for text in texts]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ends = np.cumsum(lengths)
        flat = np.concatenate([*rows, np.zeros(self.length, np.uint64)])
        end_of = np.repeat(ends, lengths)  # of the text that a word belongs to
        place = np.arange(len(end_of))
        total = np.zeros(len(end_of), np.uint64)
        for shift, factor in enumerate(self._factors):
            inside = place + shift < end_of
            total += np.where(inside, flat[shift : shift + len(total)], 0) * factor
        starts = np.repeat(ends - lengths, lengths)
        whole = (place + self.length <= end_of) | (place == starts)
        counts = np.maximum(lengths - self.length + 1, 1)
        return mixed(total[whole]), np.concatenate([[0], np.cumsum(counts)])

    def sets(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The distinct shingles of each text, sorted."""
        flat, offsets = self.hashes(texts)
        return [np.unique(flat[a:b]) for a, b in pairwise(offsets)]

    def _word_hashes(self, text: str) -> np.ndarray:
        found = words(text, symbols=self._symbols) or [text.strip()]
        if len(self._hashes) > _MOST_WORDS_KEPT:
            self._hashes.clear()
        return np.fromiter(map(self._hashes.__getitem__, found), np.uint64, len(found))


class _WordHashes(dict[str, int]):
    """The 64-bit hash of each word; those asked for before are kept."""

    def __missing__(self, word: str) -> int:
        digest = blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
        self[word] = value = int.from_bytes(digest, "little")
        return value


def mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of a value spread over all of them. Source: Steele et al. 2014, SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9 & _MASK)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB & _MASK)
    return values ^ (values >> np.uint64(31))
