"""The generated documents are those of the code they describe."""

from __future__ import annotations

import json

import pytest

from mule.commands import docs
from mule.config.docs import DOCS, MARKDOWN, SCHEMA, config_markdown, json_schema
from mule.errors import UserError

REMEDY = "run: make docs"


def _text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def test_the_settings_page_is_fresh() -> None:
    assert _text(MARKDOWN) == config_markdown(), REMEDY


def test_the_json_schema_is_fresh() -> None:
    assert json.loads(_text(SCHEMA)) == json_schema(), REMEDY


def test_the_page_of_sizes_is_fresh() -> None:
    assert _text(docs.SIZES_PAGE) == docs.sizes_markdown(), REMEDY


def test_the_page_of_performance_is_fresh() -> None:
    page = _text(docs.PERFORMANCE_PAGE)
    assert docs.with_generated(page, docs.performance_markdown()) == page, REMEDY


def test_only_the_generated_part_is_replaced() -> None:
    page = f"before\n{docs._BEGIN}\nold\n{docs._END}\nafter\n"
    once = docs.with_generated(page, "new\n")
    assert once == f"before\n{docs._BEGIN}\n\nnew\n\n{docs._END}\nafter\n"
    assert docs.with_generated(once, "new\n") == once
    with pytest.raises(UserError, match="lost the marks"):
        docs.with_generated("before\nafter\n", "new")
