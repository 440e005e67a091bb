"""Scores of the demo's atlas: is the fact right, and does the pirate speak?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule.data.atlas.facts import COUNTRIES
from mule.errors import DataError


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the user; `answer` holds the words that make a reply right."""

    messages: list[dict[str, str]]
    answer: str
    kind: str
    country: str
    seen_wording: bool
    split: str


@dataclass(frozen=True)
class Completion:
    """The beginning of a sentence; `answer` begins with the space that follows `prompt`."""

    prompt: str
    answer: str
    kind: str
    country: str
    seen_form: bool


@dataclass(frozen=True)
class Scored:
    """A reply to a question."""

    question: Question
    text: str
    correct: bool
    persona: bool


def load_questions(path: Path | str) -> list[Question]:
    """The rows of `questions.jsonl`; DataError names the line that is not one."""
    return [_build(Question, row, path, i) for i, row in _read_rows(path)]


def load_completions(path: Path | str) -> list[Completion]:
    """The rows of `completions.jsonl`; DataError names the line that is not one."""
    return [_build(Completion, row, path, i) for i, row in _read_rows(path)]


def exact_match(answer_text: str, expected: str) -> bool:
    """Whether the key answer is there as whole words, and no rival of it.

    A rival is another country's capital, or another continent, currency or river than the expected
    one. A number must be the last number of the reply, since worked steps hold others.
    """
    if expected.isdecimal():
        numbers = re.findall(r"\d+", answer_text)
        return bool(numbers) and numbers[-1] == expected
    for capital in _capitals_of(expected):  # Mexico City does not name Mexico
        answer_text = re.sub(_whole_words(capital), " ", answer_text)
    rest = re.sub(_whole_words(expected), " ", answer_text)
    return rest != answer_text and not any(_holds(rest, rival) for rival in _rivals(expected))


def completion_match(text: str, expected: str) -> bool:
    """Whether the text that follows a beginning starts with the expected words."""
    return re.match(rf"\s*{re.escape(expected.strip())}(?!\w)", text) is not None


_PIRATE = re.compile(
    r"\b(arr+|ahoy|aye|avast|matey|mateys|ye|landlubbers?|yo ho|shiver me timbers)\b", re.IGNORECASE
)


def in_persona(text: str) -> bool:
    """Whether the text holds a pirate's word."""
    return _PIRATE.search(text) is not None


def score(question: Question, text: str) -> Scored:
    """Judge one reply."""
    return Scored(question, text, exact_match(text, question.answer), in_persona(text))


def summarise(results: Sequence[Scored]) -> dict[str, Any]:
    """The figures of one stage; a share over no questions is None.

    `exact_match` and `exact_match_unseen` are over capitals, in wordings seen in training or not;
    `persona` is over all replies; `by_kind` has both shares and the number of questions of each.
    """
    kinds = dict.fromkeys(result.question.kind for result in results)
    by_kind = {
        kind: {
            "exact_match": _share_correct(results, kind, seen=True),
            "exact_match_unseen": _share_correct(results, kind, seen=False),
            "num_questions": sum(result.question.kind == kind for result in results),
        }
        for kind in kinds
    }
    return {
        "exact_match": _share_correct(results, "capital", seen=True),
        "exact_match_unseen": _share_correct(results, "capital", seen=False),
        "persona": _share(result.persona for result in results),
        "num_questions": len(results),
        "by_kind": by_kind,
    }


def _share_correct(results: Sequence[Scored], kind: str, seen: bool) -> float | None:
    return _share(
        result.correct
        for result in results
        if result.question.kind == kind and result.question.seen_wording == seen
    )


def _share(flags: Iterable[bool]) -> float | None:
    values = list(flags)
    return sum(values) / len(values) if values else None


_CAPITALS = frozenset(country.capital for country in COUNTRIES)
_TABLES = (
    frozenset(country.continent for country in COUNTRIES),
    frozenset(country.currency for country in COUNTRIES),
    frozenset(country.river for country in COUNTRIES if country.river is not None),
)


def _rivals(expected: str) -> set[str]:
    others = set(_CAPITALS - _capitals_of(expected))
    for table in _TABLES:
        if expected in table:
            others |= table
    return others - {expected}


def _capitals_of(name: str) -> set[str]:
    return {country.capital for country in COUNTRIES if country.name == name}


def _holds(text: str, words: str) -> bool:
    return re.search(_whole_words(words), text) is not None


def _whole_words(words: str) -> str:
    return rf"(?i)(?<!\w){re.escape(words)}(?!\w)"


def _read_rows(path: Path | str) -> list[tuple[int, Any]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(path, None, "no such file", "make the atlas again: mule demo") from None
    rows = []
    for i, line in enumerate(lines, start=1):
        try:
            rows.append((i, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(path, i, f"not valid JSON ({error})", "make the atlas again") from None
    return rows


def _build(kind: type[Any], row: Any, path: Path | str, line: int) -> Any:
    names = list(kind.__dataclass_fields__)
    if not isinstance(row, dict) or set(row) != set(names):
        raise DataError(path, line, f"expected an object with {', '.join(names)}", "make it again")
    return kind(**row)
