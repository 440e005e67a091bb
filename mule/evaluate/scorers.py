"""Judging one answer: as its reference, by a pattern, word by word, by what it must and must not be."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from mule.evaluate.json_schema import violations

_MIN_LETTERS = 20  # in less, the language of a text is a guess
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_EDGES = " \t\n\r\"'`*_.,;:!?\u201c\u201d\u2018\u2019"
_FENCE = re.compile(r"^\s*```[\w-]*\n(.*?)\n?```\s*$", re.DOTALL)
_RUN_WORDS = 4


def plain(text: str) -> str:
    """A text as `exact` compares it: one case, single spaces, no quotes or full stop around it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(_EDGES)


def exact(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer is one of the references, but for case, spaces and marks around it."""
    return plain(answer) in {plain(reference) for reference in references}


def f1(answer: str, references: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, with the reference that fits best.

    In one case, without English articles and punctuation.
    Source: Rajpurkar et al. 2016, SQuAD, section 6.1.
    """
    return max((_f1(_words(answer), _words(reference)) for reference in references), default=0.0)


def repeated_share(text: str) -> float:
    """The share of runs of four words that were there before: 0 of prose, near 1 of a loop.

    Source: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training (seq-rep-4).
    """
    words = text.split()
    runs = [
        tuple(words[start : start + _RUN_WORDS]) for start in range(len(words) - _RUN_WORDS + 1)
    ]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def unfenced(text: str) -> str:
    """What a Markdown fence encloses, where it encloses the whole answer."""
    found = _FENCE.match(text)
    return found[1] if found else text


def json_faults(text: str, schema: dict[str, Any]) -> list[str]:
    """Why an answer is not the JSON that is asked for; nothing where it is."""
    try:
        value = json.loads(unfenced(text))
    except (ValueError, RecursionError):
        return ["not JSON"]
    return violations(value, schema)


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's language; None where there are too few letters to tell."""
    if sum(map(str.isalpha, text)) < _MIN_LETTERS:
        return None
    import py3langid

    return py3langid.classify(text)[0]


def holds(text: str, part: str) -> bool:
    """Whether `part` is in the text as whole words, in any case."""
    left = r"(?<!\w)" if re.match(r"\w", part) else ""
    right = r"(?!\w)" if re.search(r"\w$", part) else ""
    return re.search(f"{left}{re.escape(part)}{right}", text, re.IGNORECASE) is not None


Check = Callable[[str], bool]


def checks_of(wanted: dict[str, Any]) -> dict[str, Check]:
    """The checks of a task by name, each a question to an answer; `wanted` as in its file."""
    make: dict[str, Callable[[Any], Check]] = {
        "contains": lambda parts: lambda text: all(holds(text, part) for part in parts),
        "contains_any": lambda parts: lambda text: any(holds(text, part) for part in parts),
        "lacks": lambda parts: lambda text: not any(holds(text, part) for part in parts),
        "matches": lambda pattern: lambda text: re.search(pattern, text) is not None,
        "lacks_match": lambda pattern: lambda text: re.search(pattern, text) is None,
        "json_schema": lambda schema: lambda text: not json_faults(text, schema),
        "language": lambda code: lambda text: language_of(text) == code,
        "min_words": lambda least: lambda text: len(text.split()) >= least,
        "max_words": lambda most: lambda text: len(text.split()) <= most,
        "max_characters": lambda most: lambda text: len(text.strip()) <= most,
        "max_lines": lambda most: lambda text: len(text.strip().splitlines()) <= most,
    }
    return {name: make[name](value) for name, value in wanted.items()}


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _ARTICLES.sub(" ", re.sub(r"[^\w\s]", " ", folded)).split()


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference))
