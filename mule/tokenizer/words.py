"""The ids of plain text by looking its words up: several times faster than encoding it anew.

A byte-level BPE first splits a text into words by a pattern, then encodes each word alone, so the
ids of a text are the ids of its words, and natural text repeats its words. The words are split here
by the same pattern in another regular-expression engine; their ids come from the tokenizer itself.
What the two engines might see differently is a character's class, so every character is tried in
both once, before a text that holds it is split here; other texts go to the tokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import regex
from tokenizers import Tokenizer as Backend

_MAX_WORDS = 1_000_000  # kept, some 200 MB; natural text of 5 GB holds fewer that repeat

# Published patterns, each with its meaning where a text is ASCII: stdlib's engine is twice as fast.
_GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'(?:[stmdSTMD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}"
    r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_QWEN2 = tuple(p.replace(r"\p{N}{1,3}", r"\p{N}").replace("[0-9]{1,3}", "[0-9]") for p in _LLAMA3)
PATTERNS = {pair[0]: pair for pair in (_GPT2, _LLAMA3, _QWEN2)}

Split = Callable[[str], list[str]]


class WordEncoder:
    """Encodes texts as `backend` does; any of its threads may use it."""

    def __init__(self, backend: Backend, pattern: tuple[str, ...], plain: Backend) -> None:
        self._splitter = backend.pre_tokenizer
        self._split: Split = regex.compile(pattern[0]).findall
        self._split_ascii: Split = re.compile(pattern[1], re.ASCII).findall
        self._composes = backend.normalizer is not None
        added = backend.get_added_tokens_decoder()
        ids = {token.content: array("I", [token_id]).tobytes() for token_id, token in added.items()}
        self._added_ids = ids
        self._specials = _any_of(ids)
        self._others_added = _any_of(t.content for t in added.values() if not t.special)
        self._words = _Words(plain)
        self._alikes: set[str] = set()
        self._others: set[str] = set()
        self._ascii = all(self._alike(chr(code), self._split_ascii) for code in range(128))

    @classmethod
    def make(cls, backend: Backend) -> WordEncoder | None:
        """An encoder for a tokenizer that splits by a pattern known here; else None."""
        content = json.loads(backend.to_str())
        model, normalizer = content["model"], content["normalizer"]
        pattern = _pattern(content["pre_tokenizer"] or {})
        if pattern is None or model["type"] != "BPE" or model.get("dropout"):
            return None
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            return None
        if normalizer is not None and normalizer != {"type": "NFC"}:
            return None
        added = backend.get_added_tokens_decoder().values()
        if any(token.lstrip or token.rstrip or token.single_word for token in added):
            return None
        plain = Backend.from_str(json.dumps({**content, "added_tokens": []}))
        return cls(backend, pattern, plain)

    def encode(self, text: str, *, special: bool) -> np.ndarray | None:
        """The ids of `text` (n,) uint32; None where only the tokenizer itself can tell them.

        `special` parses special tokens written in the text.
        """
        # Added tokens are cut out first; what stands between them is encoded by itself.
        *parts, last = (self._specials if special else self._others_added).split(text)
        found = []
        for plain, token in zip(parts[::2], parts[1::2]):
            found += [self._plain(plain), self._added_ids[token]]
        found.append(self._plain(last))
        known = [part for part in found if part is not None]
        if len(known) < len(found):
            return None
        # Joined as bytes: no Python integer is made of a token.
        return np.frombuffer(b"".join(known), dtype=np.uint32)

    def _plain(self, text: str) -> bytes | None:
        if text.isascii():
            if not self._ascii:
                return None
            words = self._split_ascii(text)
        else:
            if self._composes and not unicodedata.is_normalized("NFC", text):
                return None
            if not self._tell_alike(set(text)):
                return None
            words = self._split(text)
        return b"".join(map(self._words.__getitem__, words))

    def _tell_alike(self, characters: set[str]) -> bool:
        new = characters - self._alikes - self._others
        for character in new:
            (self._alikes if self._alike(character, self._split) else self._others).add(character)
        return characters <= self._alikes

    def _alike(self, character: str, split: Split) -> bool:
        """Whether both engines put `character` into the same class: alone, or with its kind."""
        if 0xD800 <= ord(character) < 0xE000:
            return False  # half of a character: the tokenizer refuses it
        c = character
        probe = f"a{c}b 1{c}2 !{c}! {c} {c}{c}'{c}s"
        if self._composes and not unicodedata.is_normalized("NFC", probe):
            return False
        ends, place = [], 0
        for word in split(probe):
            place += len(word)
            ends.append(place)
        assert self._splitter is not None
        return ends == [end for _, (_, end) in self._splitter.pre_tokenize_str(probe)]


class _Words(dict[str, bytes]):
    """The ids (uint32) of every word met so far; a new one is given to the tokenizer."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, word: str) -> bytes:
        ids = array("I", self._backend.encode(word, add_special_tokens=False).ids).tobytes()
        if len(self) < _MAX_WORDS:
            self[word] = ids
        return ids


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that captures the longest of `tokens` at the first place where one stands."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _pattern(pre_tokenizer: dict) -> tuple[str, ...] | None:
    """The known pattern by which `pre_tokenizer` (as in tokenizer.json) splits; else None."""
    if pre_tokenizer.get("type") == "ByteLevel":
        plain = pre_tokenizer["use_regex"] and not pre_tokenizer["add_prefix_space"]
        return _GPT2 if plain else None
    steps: Sequence[dict] = pre_tokenizer.get("pretokenizers", ())
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, bytes_of = steps
    if split["behavior"] != "Isolated" or split["invert"]:
        return None
    if bytes_of["use_regex"] or bytes_of["add_prefix_space"]:
        return None
    return PATTERNS.get(split["pattern"].get("Regex", ""))
