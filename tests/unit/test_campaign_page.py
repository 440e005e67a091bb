"""bench/campaign_page.py: a campaign's report as a page of the documentation."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from mule.commands import docs
from tests.lab_campaign import VARIANTS, Plan, write_campaign

SCRIPTS = Path(__file__).resolve().parents[2] / "bench"


def test_the_page_says_how_it_was_made_and_has_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as for a script that is run
    monkeypatch.setattr(docs.settings, "DOCS", tmp_path / "docs")
    variants = {name: VARIANTS[name] for name in ("mha", "gqa")}
    plan = Plan(variants=variants, runs=False, measured=False)
    write_campaign(tmp_path / "campaigns" / "two", plan)
    old = tmp_path / "docs" / "results" / "two" / "old.svg"
    old.parent.mkdir(parents=True)
    old.write_text("<svg/>")
    monkeypatch.chdir(tmp_path)
    page = importlib.import_module("campaign_page").publish(Path("campaigns/two"))
    text = page.read_text()
    title, _, made = text.splitlines()[:3]
    assert page == tmp_path / "docs" / "results" / "two.md" and title.startswith("# ")
    assert "`mule lab run lab/two`, `python bench/campaign_page.py campaigns/two`" in made
    pictures = set(re.findall(r"]\((two/[^)]+\.svg)\)", text))
    assert pictures and "report-figures" not in text
    assert pictures == {f"two/{one.name}" for one in (page.parent / "two").iterdir()}
