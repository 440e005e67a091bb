"""`mule data check` on published data: what is wrong with each file, and no false alarm."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mule.commands import data_check

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data"),
]


@cache
def _check(name: str, *more: str) -> dict[str, Any]:
    return data_check.run([str(SHARED / name), *more])


def _counts(result: dict[str, Any], severity: str) -> dict[str, int]:
    return {p["code"]: p["count"] for p in result["problems"] if p["severity"] == severity}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "format", "errors"),
    [
        ("alpaca/alpaca_en_demo.json", 899, "alpaca", {}),
        ("alpaca/alpaca_data_cleaned_first500.json", 500, "alpaca", {}),
        ("alpaca/instruction-data.json", 1100, "alpaca", {}),
        ("alpaca/identity.json", 91, "alpaca", {"placeholder": 85}),
        pytest.param("gsm8k", 7473, "gsm8k", {}, marks=pytest.mark.slow),
        pytest.param("gsm8k/main", 7473, "gsm8k", {}, marks=pytest.mark.slow),
        pytest.param("dolly/databricks-dolly-3k.jsonl", 2996, "dolly", {}, marks=pytest.mark.slow),
        ("oasst/oasst1-en-validation.messages.jsonl", 188, "oasst", {}),
        ("oasst/en_100_tree.jsonl", 100, "oasst", {}),
        pytest.param(
            "sharegpt/oasst1-en-validation-sharegpt.json",
            911,
            "sharegpt",
            {},
            marks=pytest.mark.slow,
        ),
        ("sharegpt/glaive_toolcall_en_demo.json", 300, "sharegpt", {}),
        ("sharegpt/dummy_conversation.json", 500, "sharegpt", {}),
        ("hawaiian-pizza", 320, "messages", {"leak": 3, "near-leak": 45}),
        ("mlx-wikisql", 1000, "text_rows", {}),
        ("mlx-prompt-completion", 1800, "pairs", {"leak": 16}),
        ("preference/dpo_en_demo.json", 300, "preference", {"preference": 1}),
        ("preference/kto_en_demo.json", 300, "preference", {"preference": 1}),
        ("preference/instruction-data-with-preference.json", 1100, "preference", {"preference": 1}),
        pytest.param("code/codegen-instruct.json", 4535, "alpaca", {}, marks=pytest.mark.slow),
        ("code/mbpp.jsonl", 974, "mbpp", {}),
        ("code/HumanEval.jsonl.gz", 164, "humaneval", {"evaluation-set": 1}),
        pytest.param("roleplay", 1923, "alpaca", {}, marks=pytest.mark.slow),
        ("c4", 300, "text_rows", {}),
        ("wikitext/wikitext-2/valid.txt", 60, "wikitext", {}),
        pytest.param("wikitext/wiki_demo.txt", 1, "text", {}, marks=pytest.mark.slow),
        ("tiny-shakespeare", 1, "text", {}),
        ("tinystories", 1000, "text", {}),
        pytest.param("books-fr", 9, "text", {}, marks=pytest.mark.slow),
    ],
)
def test_errors_of_each_file(name: str, rows: int, format: str, errors: dict[str, int]) -> None:
    result = _check(name)
    assert (result["rows"], result["format"]) == (rows, format)
    assert _counts(result, "error") == errors
    assert result["ok"] is not bool(errors)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gsm8k", marks=pytest.mark.slow),  # thousands of numbers
        "alpaca/alpaca_data_cleaned_first500.json",
        pytest.param("roleplay", marks=pytest.mark.slow),
        "mlx-wikisql",
        pytest.param("books-fr", marks=pytest.mark.slow),  # accents on every line
        "tiny-shakespeare",
        pytest.param("wikitext/wiki_demo.txt", marks=pytest.mark.slow),
    ],
)
def test_clean_files_have_no_warning(name: str) -> None:
    assert _counts(_check(name), "warning") == {}


@pytest.mark.parametrize(
    ("name", "code", "count"),
    [
        ("alpaca/alpaca_en_demo.json", "duplicate", 14),
        ("preference/kto_en_demo.json", "mojibake", 2),
        ("tinystories", "mojibake", 83),
        ("c4", "replacement", 4),
        ("alpaca/identity.json", "conflict", 2),
        ("hawaiian-pizza", "openings", 0),
    ],
)
def test_known_flaws_are_found(name: str, code: str, count: int) -> None:
    assert {p["code"]: p["count"] for p in _check(name)["problems"]}[code] == count


@pytest.mark.slow
def test_no_personal_strings_in_arithmetic_and_code() -> None:
    for name in ("gsm8k", "code/mbpp.jsonl", "code/HumanEval.jsonl.gz"):
        codes = {p["code"] for p in _check(name)["problems"]}
        assert not [code for code in codes if code.startswith(("pii", "secret"))]


@pytest.mark.slow
def test_two_editions_of_the_same_articles_leak() -> None:
    other = SHARED / "wikitext/wikitext-103/wiki.valid.tokens"
    result = _check("wikitext/wikitext-2/valid.txt", f"data.valid={other}")
    assert list(_counts(result, "error")) == ["near-leak"] and result["leaks"]["near"] >= 50


@pytest.mark.slow
def test_languages_of_the_files() -> None:
    assert list(_check("books-fr")["languages"]["languages"]) == ["fr"]
    assert next(iter(_check("gsm8k")["languages"]["languages"])) == "en"
    assert next(iter(_check("alpaca/identity.json")["languages"]["languages"])) == "zh"
