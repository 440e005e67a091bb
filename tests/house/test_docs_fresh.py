"""The generated documents are those of the schema."""

from __future__ import annotations

import json

from mule.config.docs import DOCS, MARKDOWN, SCHEMA, config_markdown, json_schema

REMEDY = "run: python -m mule.config.docs"


def test_the_settings_page_is_fresh() -> None:
    assert (DOCS / MARKDOWN).read_text(encoding="utf-8") == config_markdown(), REMEDY


def test_the_json_schema_is_fresh() -> None:
    assert json.loads((DOCS / SCHEMA).read_text(encoding="utf-8")) == json_schema(), REMEDY
