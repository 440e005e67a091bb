"""Fixtures of the browser tests: a folder with real runs, a server of it, a visit, and axe.

A test fails when a request leaves the server, an error stands on the console, or the content policy
refuses something. They are skipped where there is no chromium.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.visitor import Served, Visit, launched, missing, serving, visiting
from tests.browser.workplace import kept_workplace
from tests.machine_cache import own_machine_cache

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_SERIOUS = ("serious", "critical")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium; at the end of the package, so that its event loop is gone for other tests."""
    if lacks := missing():
        pytest.skip(lacks)
    with launched() as found:
        yield found


@pytest.fixture(scope="package")
def made_folder() -> Path:
    """The kept folder: not to be changed."""
    if lacks := missing():
        pytest.skip(lacks)
    return kept_workplace()


@pytest.fixture(scope="package", autouse=True)
def machine_cache(made_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers and their jobs measure nothing: the figures of this machine are made up."""
    with own_machine_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def folder(made_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder, of this module's own."""
    copy = tmp_path_factory.mktemp("work") / "models"
    shutil.copytree(made_folder, copy)
    return copy


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    """`mule ui` in `folder`."""
    with serving(folder) as served:
        yield served


@pytest.fixture
def visit(browser: Browser, server: Served) -> Iterator[Visit]:
    """The pages at 1920 pixels; at the end nothing may have been wrong with them."""
    with visiting(browser, server) as visited:
        yield visited
        assert not visited.complaints, "\n".join(visited.complaints)


@pytest.fixture
def page(visit: Visit) -> Page:
    """The page of `visit`."""
    return visit.page


@pytest.fixture(scope="session")
def axe() -> Callable[[Page], list[str]]:
    """What axe finds on a page, by its impact: serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    tool = Axe()

    def findings(page: Page) -> list[str]:
        found = tool.run(page).response["violations"]
        return [
            f"{each['id']} ({each['impact']}): {each['help']}: {node['html'][:200]}"
            for each in found
            if each["impact"] in _SERIOUS
            for node in each["nodes"]
        ]

    return findings
