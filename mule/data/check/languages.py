"""Which languages and scripts the data is in, by a sample of its texts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mule.data.check.findings import Problem
from mule.data.check.row import CheckRow

_SAMPLE_TEXTS = 1000  # a share of 5% is then right within 1.4 points, in under half a second
_SAMPLE_CHARS = 600  # of one text: the language is certain by then
_MIN_LETTERS = 60  # in less, the guess is a guess
_CODE = re.compile(r"[{}()\[\]<>=;_/\\*|#]")
_CODE_SHARE = 0.05  # of such characters: a program, which the guess takes for a rare language
_SHARE_SHOWN = 0.02  # below it, most findings are errors of the guess
_SHARE_WORTH_OTHER = 0.005  # less would show as 0%
_SHARE_TOLD = 0.1  # a second language of this share is worth a line


class Languages:
    """A sample spread evenly over all rows: every second text goes when it is full."""

    def __init__(self) -> None:
        self._sample: list[str] = []
        self._every = 1
        self._seen = 0

    def add(self, row: CheckRow) -> None:
        self._seen += 1
        if self._seen % self._every or row.part != "train":
            return
        if prose := [text for text in row.texts if _is_prose(text[:_SAMPLE_CHARS])]:
            self._sample.append(max(prose, key=len)[:_SAMPLE_CHARS])
        if len(self._sample) > _SAMPLE_TEXTS:
            self._sample, self._every = self._sample[1::2], self._every * 2

    def figures(self) -> dict[str, Any]:
        """Shares of the sampled texts by language, and of their letters by script."""
        if not self._sample:
            return {"sampled": 0, "languages": {}, "scripts": {}}
        import py3langid

        found = Counter(py3langid.classify(text)[0] for text in self._sample)
        letters = Counter("".join(self._sample))
        scripts: Counter[str] = Counter()
        for character, count in letters.items():
            if character.isalpha():
                scripts[unicodedata.name(character, "unknown").split()[0].lower()] += count
        return {
            "sampled": len(self._sample),
            "languages": _shares(found),
            "scripts": _shares(scripts),
        }


def problems(figures: dict[str, Any]) -> Iterator[Problem]:
    """A note where a second language is more than an accident."""
    shares = figures["languages"]
    if len([share for share in shares.values() if share >= _SHARE_TOLD]) > 1:
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        yield Problem(
            "note",
            "languages",
            f"several languages: {told}",
            "fine if it is meant; each learns from its own share only",
        )


def _is_prose(text: str) -> bool:
    if sum(map(str.isalpha, text)) < _MIN_LETTERS:
        return False
    return len(_CODE.findall(text)) < _CODE_SHARE * len(text)


def _shares(counts: Counter[str]) -> dict[str, float]:
    """The largest first; the small ones together as "other"."""
    total = counts.total()
    shares = {name: count / total for name, count in counts.most_common()}
    large = {name: share for name, share in shares.items() if share >= _SHARE_SHOWN}
    rest = 1 - sum(large.values())
    return {**large, "other": rest} if rest >= _SHARE_WORTH_OTHER else large
