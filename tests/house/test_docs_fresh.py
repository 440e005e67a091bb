"""The generated documents are those of the code they describe."""

from __future__ import annotations

import json

import pytest

from mule.commands import (
    docs,
    docs_accuracy,
    docs_cli,
    docs_doctor,
    docs_proof,
    docs_serve,
    docs_verify,
)
from mule.config.docs import DOCS, MARKDOWN, SCHEMA, config_markdown, json_schema
from mule.errors import UserError

REMEDY = "run: make docs"


def _text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def test_the_settings_page_is_fresh() -> None:
    assert _text(MARKDOWN) == config_markdown(), REMEDY


def test_the_json_schema_is_fresh() -> None:
    assert json.loads(_text(SCHEMA)) == json_schema(), REMEDY


PAGES = (
    *(docs.SIZES_PAGE, docs.PERFORMANCE_PAGE, docs.DATA_PAGE, docs.CHOOSE_PAGE),
    docs_serve.PAGE,
    docs_verify.PAGE,
    docs_doctor.PAGE,
    docs_accuracy.PAGE,
    docs_cli.PAGE,
    *(f"../{name}" for name in docs_proof.PAGES),
)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_fresh(page: str) -> None:
    assert _text(page) == docs.generated_pages()[page], REMEDY


def test_only_the_generated_part_is_replaced() -> None:
    begin, end = (mark.format("generated") for mark in docs._MARKS)
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    once = docs.with_generated(page, "new\n")
    assert once == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert docs.with_generated(once, "new\n") == once
    with pytest.raises(UserError, match="lost the marks"):
        docs.with_generated("before\nafter\n", "new")
