"""The page Compare as a person uses it: runs side by side, a setup beside published ones, the lab."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mule.web.ids import id_of
from tests.browser.visitor import DESK, PHONE, Served, Visit, visiting
from tests.browser.workplace import BASE, FAULTY
from tests.lab_campaign import Plan, write_campaign

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module", autouse=True)
def campaign(folder: Path) -> str:
    """A campaign beside the runs."""
    two = {"mha": {}, "gqa": {"attention": "gqa"}}
    write_campaign(folder / "campaigns" / "shapes", Plan(variants=two, effects={"gqa": 0.05}))
    return "shapes"


def test_two_runs_side_by_side(visit: Visit) -> None:
    page = visit.go("compare")
    page.get_by_label(BASE, exact=True).check()
    page.get_by_role("button", name="Compare runs").click()
    page.get_by_text("choose two to 8 runs, and compare them").wait_for()
    visit.forgive("422")
    page.get_by_label(FAULTY, exact=True).check()
    page.get_by_role("button", name="Compare runs").click()
    page.locator("[data-curves] .main-svg").first.wait_for()
    assert page.get_by_role("rowheader", name="optim.learning_rate").count() == 1
    assert page.get_by_role("rowheader", name="best val loss").count() == 1
    names = page.locator("[data-curves] .legendtext").all_text_contents()
    assert f"{BASE}, training" in names and f"{FAULTY}, validation" in names
    page.locator("[data-axis]").select_option("steps")
    page.locator("[data-curves] .xtitle", has_text="updates").wait_for()
    page.reload()
    visit.settled()
    page.locator("[data-curves] .main-svg").first.wait_for()
    assert page.get_by_label(FAULTY, exact=True).is_checked()


def test_a_setup_beside_published_ones_opens_nothing_by_itself(visit: Visit) -> None:
    page = visit.go("compare")
    page.get_by_label("Yours").select_option(id_of(f"run/{BASE}"))
    page.get_by_text("Beside which of the published setups").click()
    page.get_by_label("Alpaca 7B").check()
    page.get_by_role("button", name="Compare the setup").click()
    page.get_by_role("heading", name="Starting again, fast and good").wait_for()
    page.get_by_text("Where every value is from").click()
    links = page.locator("[data-result] a[href^=http]")
    assert links.count() > 0
    assert all(
        link.get_attribute("href") == link.inner_text()
        and link.get_attribute("rel") == "noreferrer noopener"
        for link in links.all()
    )


def test_a_campaign_with_its_plots(visit: Visit, campaign: str) -> None:
    page = visit.go("compare")
    page.get_by_role("link", name=campaign).click()
    page.get_by_role("heading", name="Architectures compared: lab-test").wait_for()
    pictures = page.locator("figure img")
    assert pictures.count() > 3
    loaded = pictures.evaluate_all(
        "images => Promise.all(images.map(i => i.decode().then(() => i.naturalWidth > 0)))"
    )
    assert all(loaded)


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_it_is_read_at_any_width_and_by_anyone(
    browser: Browser, server: Served, axe: Callable[[Page], list[str]], campaign: str, theme: str
) -> None:
    size = PHONE if theme == "dark" else DESK
    places = {
        f"compare?run={id_of(BASE)}&run={id_of(FAULTY)}": "[data-curves] .main-svg",
        f"compare?of={id_of(f'run/{BASE}')}": "[data-result] h2",
        f"compare/{campaign}": "figure img",
    }
    with visiting(browser, server, size, theme) as visit:
        for place, whole in places.items():
            page = visit.go(place)
            page.locator(whole).first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), place
            assert not axe(page), f"{place}: {axe(page)}"
        assert not visit.complaints
