"""docs/import.md: its example runs, and its figures are those that the tests count."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mule.compare.dialects.known import DIALECTS
from tests.conftest import Mule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "import.md"
COMMAND = "mule recipe import sft.yml --devices 2 --out recipe.yaml"


def block(name: str) -> str:
    """What stands between two marks of the page, without the fence around it."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(
        rf"<!-- {name}: begin -->\n```\w*\n(.*?)```\n<!-- {name}: end -->", text, re.S
    )
    assert found is not None, name
    return found[1]


def plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n"


def test_the_example_prints_what_the_page_shows(
    mule_cli: Mule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    Path("sft.yml").write_text(block("file"), encoding="utf-8")
    code, out, _ = mule_cli(*COMMAND.split()[1:])
    assert code == 0
    assert block("example") == f"$ {COMMAND}\n{plain(out)}"
    assert block("recipe") == Path("recipe.yaml").read_text(encoding="utf-8")


def test_the_page_names_every_tool_and_version() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for dialect in DIALECTS.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| {dialect.title} |"))
        assert dialect.version in row or "its Makefile" in row
