"""Judging answers: hostile numbers, exact, F1, JSON, language, repetition."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from mule.evaluate.json_schema import refusal, violations
from mule.evaluate.numbers import final_number, same_number
from mule.evaluate.scorers import (
    checks_of,
    exact,
    f1,
    holds,
    json_faults,
    language_of,
    repeated_share,
)

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 24", "24"),
        ("Half of 48 is <<48/2=24>>.", "48"),  # the mark itself is no number of the text
        ("#### 24 apples, not 25", "24"),
        ("#### 24\n\nQuestion: another 99\n#### 7", "24"),
        ("####24.", "24"),
        ("#### $1,234.50", "1234.5"),
        ("#### -3", "-3"),
        ("The total is $ 12,345,678.", "12345678"),
        ("That makes -$5.", "-5"),
        ("That makes $-5.", "-5"),
        ("It is \u221212 degrees", "-12"),
        ("10-5=5", "5"),
        ("so 10 - 5", "5"),
        ("- 24 eggs", "24"),  # a bullet
        ("between 5\u201310", "10"),
        ("**24**", "24"),
        ("\\boxed{1{,}024}", "1024"),
        ("The answer is \\boxed{7}, since 3 + 4 = 7 and 2 more are 9", "7"),
        ("The answer is 15 because 3 + 12", "15"),
        ("The answer is 5 * 3 = 15. Check: 4", "15"),
        ("Answer: 8 hours", "8"),
        ("the answer is yes, 12", "12"),
        ("24km", "24"),
        ("24 %", "24"),
        ("3/4 of a cup", "0.75"),
        ("2 1/2 hours", "2.5"),
        ("1.234,56 euros", "1234.56"),
        (".5", "0.5"),
        ("24.", "24"),
        ("24.0", "24"),
        ("1e3", "1000"),
        ("0", "0"),
        ("#### 0", "0"),
        ("it was 24...", "24"),
        ("on 10/12/2024", "10"),
        ("v3.5.2", None),
        ("H2O and CO2", None),
        ("no number", None),
        ("", None),
        ("####", None),
        ("9" * 500, None),
        ("<<<<>>>>" * 50 + " 3", "3"),
    ],
)
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "right"),
    [("24.00", True), ("$24", True), ("24 or 25", False), ("2,400", False), ("", False)],
)
def test_a_number_is_right_by_its_value(answer: str, right: bool) -> None:
    assert same_number(answer, "so <<12*2=24>>24\n#### 24") is right


def gsm8k_rows() -> Iterator[dict[str, str]]:
    with GSM8K.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@pytest.mark.shared
@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K's test.jsonl is not beside the checkout")
def test_every_published_answer_is_read_alike_with_its_mark_and_without() -> None:
    num_rows = num_alike = 0
    for row in gsm8k_rows():
        worked, _, number = row["answer"].partition("####")
        assert final_number(row["answer"]) == Decimal(number.strip().replace(",", ""))
        num_rows += 1
        num_alike += final_number(worked) == final_number(row["answer"])
    assert num_rows == 1000
    assert num_alike > 0.9 * num_rows  # prose that ends in another number than the answer


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Paris", True),
        (' "paris." ', True),
        ("**Paris**\n", True),
        ("Pa\u200bris", False),
        ("The city is Paris", False),
        ("", False),
    ],
)
def test_exact(answer: str, right: bool) -> None:
    assert exact(answer, ["Paris", "Lutetia"]) is right


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("the Eiffel Tower", 1.0),
        ("Eiffel tower, in Paris", 2 * 2 / (4 + 2)),
        ("Tower tower tower", 2 * 1 / (3 + 2)),
        ("", 0.0),
        ("Big Ben", 0.0),
    ],
)
def test_f1_is_that_of_words(answer: str, value: float) -> None:
    assert f1(answer, ["The Eiffel Tower", "la tour"]) == pytest.approx(value)


def test_repetition_counts_runs_of_four_words() -> None:
    assert repeated_share("one two three") == 0.0
    assert repeated_share("a b c d e f g h") == 0.0
    assert repeated_share("go on " * 50) == pytest.approx(1 - 2 / 97)


@pytest.mark.parametrize(
    ("text", "part", "there"),
    [
        ("Arr, matey!", "arr", True),
        ("Barrel", "arr", False),
        ("It costs $5.", "$5", True),
        ("C++ is", "C++", True),
        ("\u00c9T\u00c9", "\u00e9t\u00e9", True),
    ],
)
def test_words_are_found_whole(text: str, part: str, there: bool) -> None:
    assert holds(text, part) is there


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ('{"name": "Anna", "age": 3}', []),
        ('```json\n{"name": "Anna"}\n```', []),
        ('Sure! {"name": "Anna"}', ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ('{"age": -1}', ["the answer lacks name", "the answer.age breaks minimum 0"]),
        ('{"name": "", "x": 1}', ["the answer.name breaks minLength 1", "the answer has x"]),
        ('{"name": "A", "age": true}', ["the answer.age is no integer"]),
        ('{"name": "A", "tags": ["a", "c"]}', ['the answer.tags[1] is none of ["a", "b"]']),
        ('["name"]', ["the answer is no object"]),
    ],
)
def test_json_against_its_schema(text: str, faults: list[str]) -> None:
    assert json_faults(text, SCHEMA) == faults


def test_a_schema_that_cannot_be_checked_is_refused() -> None:
    assert refusal(SCHEMA) is None
    said = refusal({"properties": {"x": {"oneOf": []}}})
    assert said is not None and said.startswith("`x` has `oneOf`; what can be checked is ")
    assert refusal({"type": "text"}) == "the schema has the type `text`, which JSON has not"
    assert "no regular expression" in (refusal({"pattern": "("}) or "")
    assert violations(1.0, {"type": "integer"}) == [] and violations(1, {"const": True})


def test_language_is_told_of_enough_letters() -> None:
    assert language_of("oui") is None
    assert language_of("Je ne sais pas où se trouve la gare, mais je vais demander.") == "fr"


def test_checks_by_name() -> None:
    wanted = {
        "contains": ["arr"],
        "contains_any": ["ship", "sea"],
        "lacks": ["sorry"],
        "matches": r"!$",
        "lacks_match": r"\d",
        "min_words": 2,
        "max_words": 4,
        "max_characters": 20,
        "max_lines": 1,
    }
    checks = checks_of(wanted)
    assert list(checks) == list(wanted)
    assert all(check("Arr, the sea!") for check in checks.values())
    bad = "Sorry, I have\n1 boat and nothing more"
    assert [name for name, check in checks.items() if check(bad)] == ["min_words"]
