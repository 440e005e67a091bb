"""The texts that a tokenizer is trained on, in pieces that the library can take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from mule import progress

_LONGEST_WORD = 256  # characters; beyond that a word is a blob, in quadratic time
_BLOB = re.compile(rf"(?<!\S)\S{{{_LONGEST_WORD},}}|(?<!\s)\s{{{_LONGEST_WORD},}}")


def training_pieces(texts: Iterable[str], bar: progress.Task) -> Iterator[str]:
    """The texts, cut inside words and gaps of more than 256 characters; the bar counts texts.

    Merging a pair moves the rest of its word, so a megabyte without a space would take hours.
    """
    for text in texts:
        start = 0
        for blob in _BLOB.finditer(text):
            for end in range(blob.start() + _LONGEST_WORD, blob.end(), _LONGEST_WORD):
                yield text[start:end]
                start = end
        yield text[start:]
        bar.advance()
