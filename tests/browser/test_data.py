"""The page Data as a person uses it: choose, read the report, follow a problem to its row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mule.web.ids import id_of
from tests.browser.visitor import DESK, PHONE, Served, Visit, visiting
from tests.browser.workplace import CHAT, FLAWED_DATA

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAWED = f"data/{id_of(f'file/{FLAWED_DATA}')}"
SECONDS = 1000


def checked(page: Page) -> Page:
    """The page, once its check has ended and its rows and charts are there."""
    page.wait_for_selector("[data-report] [data-state=done]", timeout=60 * SECONDS)
    page.wait_for_selector("[data-rows][aria-busy=false] article", timeout=60 * SECONDS)
    page.wait_for_selector("[data-bars] .main-svg")
    return page


def test_from_a_list_of_files_to_the_row_with_the_fault(visit: Visit, server: Served) -> None:
    page = visit.go("data")
    page.get_by_role("link", name=FLAWED_DATA).click()
    checked(page)
    assert [job["kind"] for job in server.jobs()] == ["check"]
    page.locator("[data-report] [data-go][data-line='4']").first.click()
    row = page.locator("article", has=page.get_by_role("heading", name="line 4"))
    row.wait_for()
    assert row.locator(".marks").inner_text().startswith("warning")
    assert row.locator("mark.learned").first.inner_text()
    page.wait_for_function("() => document.activeElement.textContent.startsWith('row 4')")
    page.reload()
    checked(visit.settled())
    page.get_by_role("heading", name="line 4", exact=False).first.wait_for()
    assert len(server.jobs()) == 1, "coming back asked for another check"


def test_only_the_rows_with_problems(visit: Visit) -> None:
    page = checked(visit.go(FLAWED))
    page.get_by_label("Show").select_option("any")
    page.locator(".mover", has_text="places").first.wait_for()
    assert page.locator("article").count() == page.locator("article .marks").count() > 0
    page.get_by_label("Show").select_option("")
    page.get_by_label("Go to line").fill("10")
    page.get_by_role("button", name="Go", exact=True).click()
    page.locator("article").first.get_by_role("heading", name="line 10").wait_for()
    assert "<img src=x" in page.locator("article").first.inner_text()
    assert page.locator("article img").count() == 0
    assert page.title() == f"{FLAWED_DATA} · Mule", "what stands in the data did something"


def test_hostile_data_stays_text(folder: Path, visit: Visit) -> None:
    evil = "<svg onload=alert(1)><style>*{display:none}</style>\u202e\u0007" + "A" * 300_000
    turns = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil[:60]}]
    rows = [{"messages": [turns[0] | {"content": evil[:60]}, turns[1]]}, {"messages": turns}]
    (folder / "evil.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = visit.go("data")
    page.get_by_label("A path in this folder").fill("./evil.jsonl")
    page.get_by_role("button", name="Look").click()
    checked(page)
    shown = page.locator("[data-rows]").inner_text()
    assert "<svg onload=alert(1)>" in shown and "‹U+202E›␇" in shown
    assert f"{len(evil) + 60:,} characters: too many to show them" in shown
    page.get_by_role("link", name="Data", exact=True).first.click()
    page.get_by_label("A path in this folder").fill("../elsewhere.jsonl")
    page.get_by_role("button", name="Look").click()
    page.get_by_text("is not below the folder that mule ui shows").wait_for()
    visit.forgive("422")


def test_the_rows_a_run_was_trained_on(visit: Visit) -> None:
    page = checked(visit.go(f"data/{id_of(f'run/{CHAT}')}"))
    assert f"the tokenizer of runs/{CHAT}" in page.locator("[data-rows]").inner_text()
    page.get_by_role("button", name="Look at the prepared rows").click()
    page.get_by_text("every file is as it was written").wait_for(timeout=60 * SECONDS)
    page.wait_for_selector("[data-bars='Length of prepared examples'] .main-svg")


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_it_is_read_at_any_width_and_by_anyone(
    browser: Browser, server: Served, axe: Callable[[Page], list[str]], theme: str
) -> None:
    size = PHONE if theme == "dark" else DESK
    with visiting(browser, server, size, theme) as visit:
        for place in ("data", FLAWED):
            page = visit.go(place)
            if place != "data":
                checked(page)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), place
            assert not axe(page), f"{place}: {axe(page)}"
        assert not visit.complaints
