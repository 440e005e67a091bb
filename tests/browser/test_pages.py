"""Every page in a browser: nothing asked of another place, nothing serious found by axe, both widths."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.visitor import DESK, PHONE, Served, Visit, serving, visiting
from tests.browser.workplace import BASE, FAULTY

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PAGES = ("runs", f"run/{FAULTY}", "start", "jobs", "data", "compare", "export", "chat")
_WIDER = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def folder(made_folder: Path) -> Path:
    """The kept folder itself: these tests only look."""
    return made_folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(folder, "--read-only", log=log) as served:
        yield served


@pytest.fixture(scope="module")
def open_server(made_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that may write, with a folder of its own."""
    copy = tmp_path_factory.mktemp("pages") / "models"
    shutil.copytree(made_folder, copy)
    with serving(copy) as served:
        yield served


@pytest.fixture(scope="module")
def empty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("empty")) as served:
        yield served


@pytest.mark.parametrize("place", PAGES)
def test_a_page(
    place: str, browser: Browser, open_server: Served, axe: Callable[[Page], list[str]]
) -> None:
    """At 1920 and 360 pixels, in light and dark colours."""
    with visiting(browser, open_server, DESK) as visit:
        page = visit.go(place)
        quiet(page)
        assert page.locator("h1").count() == 1
        assert page.evaluate(_WIDER) <= 0
        assert not axe(page)
        page.get_by_role("button", name="Use dark colours").click()
        page.set_viewport_size(PHONE)
        quiet(page)
        assert page.evaluate(_WIDER) <= 0, "the page scrolls sideways"
        assert not axe(page)
        assert not visit.complaints, "\n".join(visit.complaints)


def quiet(page: Page) -> None:
    """Wait until nothing that is seen is asked for any more, and charts stand."""
    page.wait_for_function(
        "() => ![...document.querySelectorAll('[aria-busy=true]')].some((e) => e.checkVisibility())"
    )
    page.wait_for_timeout(400)


@pytest.mark.parametrize("place", PAGES)
def test_an_empty_folder_says_what_to_do(
    place: str, browser: Browser, empty_server: Served
) -> None:
    with visiting(browser, empty_server, PHONE) as visit:
        place = "run/none" if place.startswith("run/") else place
        page = visit.page if place == "run/none" else visit.go(place)
        if place == "run/none":
            page.goto(f"{empty_server.url}/#/{place}")
            problem = page.get_by_role("alert")
            problem.wait_for()
            assert 'no run "none" here' in problem.inner_text()
            visit.forgive("404")
        else:
            told = page.locator(".empty").first
            told.wait_for()
            assert len(told.inner_text()) > 20
        assert not visit.complaints, "\n".join(visit.complaints)


def test_read_only_offers_nothing(visit: Visit) -> None:
    """Where nothing may be started, nothing is offered that would."""
    for place in (f"run/{BASE}", "start", "export", "chat"):
        page = visit.go(place)
        quiet(page)
        for name in ("Resume", "Start training", "Stop, saved", "Export", "Open"):
            assert page.get_by_role("button", name=name, exact=True).count() == 0, (place, name)


def test_a_page_without_the_token(browser: Browser, server: Served) -> None:
    """Whoever lacks it sees how to get it, and no data."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.get_by_role("alert").wait_for()
    text = page.inner_text("body")
    assert "does not know the server's token" in text and "open the whole address" in text
    assert BASE not in text and "locked" in text
    context.close()


def test_the_token_leaves_the_address(page: Page, server: Served) -> None:
    """Neither in the address, nor in what the page can go back to."""
    assert server.token not in page.url
    assert server.token not in str(page.evaluate("() => [document.title, document.cookie]"))
    page.go_back()
    assert server.token not in page.url


def test_the_keyboard_reaches_everything(page: Page) -> None:
    """The first Tab offers to skip the head; then the pages, the colours, and the runs."""
    reached = []
    page.evaluate("() => document.activeElement?.blur?.()")
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.textContent.trim()"))
    assert reached[0] == "Skip to the page"
    for name in ("Runs", "Start", "Data", "Compare", "Export", "Chat", "Dark", FAULTY):
        assert name in reached, reached
    page.get_by_role("link", name="Chat").focus()
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("#/chat$"))


def test_colours_follow_the_machine_and_are_kept(browser: Browser, server: Served) -> None:
    with visiting(browser, server, theme="dark") as visit:
        page = visit.page
        theme = "() => document.documentElement.dataset.theme"
        assert page.evaluate(theme) == "dark"
        page.get_by_role("button", name="Use light colours").click()
        page.reload()
        visit.settled()
        assert page.evaluate(theme) == "light"


def test_what_data_says_is_text(visit: Visit) -> None:
    """A row that holds markup is shown as it stands."""
    page = visit.go("data")
    page.get_by_role("link", name="flawed.jsonl").first.click()
    page.get_by_text("onerror=").first.wait_for()
    assert page.locator("#main img").count() == 0
    assert page.title() != "broken in"


# ---------------------------------------------------------------- the ear itself


def test_complaints_are_heard(browser: Browser, server: Served) -> None:
    """A request to another place, an inline script and an error on the console."""
    with visiting(browser, server) as visit:
        visit.page.evaluate("() => fetch('http://203.0.113.1/x').catch(() => 0)")
        visit.forgive("connect-src")
        visit.page.evaluate("() => { const i = new Image(); i.src = 'https://203.0.113.1/i.png'; }")
        visit.page.evaluate(
            "() => { const s = document.createElement('script'); s.textContent = 'window.x = 1';"
            " document.body.append(s); }"
        )
        visit.page.evaluate("() => console.error('spoken')")
        visit.page.wait_for_timeout(300)
        heard = "\n".join(visit.complaints)
        assert "img-src refused" in heard and "script-src" in heard and "spoken" in heard
        assert visit.page.evaluate("() => window.x") is None
        with pytest.raises(AssertionError, match="nothing said"):
            visit.forgive("never said")


def test_axe_sees(page: Page, axe: Callable[[Page], list[str]]) -> None:
    page.evaluate(
        "() => { document.querySelector('#main').innerHTML = '<h1>x</h1><img src=/static/mule.svg>'; }"
    )
    assert any(found.startswith("image-alt (critical)") for found in axe(page))
