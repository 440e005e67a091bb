"""What a person does: start a run, watch, stop and resume it; diagnose, compare, talk to models."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mule.run import Run
from tests.browser.visitor import DESK, PATIENCE_MS, PHONE, Served, Visit, serving, visiting
from tests.browser.workplace import BASE, CHAT, FAULTY

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, ViewportSize

_LONG_MS = 240_000  # until torch is loaded and a run has begun, on a busy machine
_BOTH = pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
NAME, STEPS = "mine", 20_000  # far more updates than are made before it is stopped


@pytest.fixture
def sized(browser: Browser, server: Served, size: ViewportSize) -> Iterator[Visit]:
    with visiting(browser, server, size) as visited:
        yield visited
        assert not visited.complaints, "\n".join(visited.complaints)


# ---------------------------------------------------------------- a run of one's own


def fill(page: Page, key: str, value: str) -> None:
    """Type into the field of this key, wherever it stands in the form."""
    field = page.locator(f'[id="field-{key}"]')
    field.evaluate("(field) => { const d = field.closest('details'); if (d) d.open = true; }")
    field.fill(value)


def updates(page: Page) -> int:
    """How many updates the head of the page tells of."""
    found = re.search(r"([\d,]+) of 20,000", page.locator("[data-part=head]").inner_text())
    return int(found[1].replace(",", "")) if found else 0


def wait_for_more(page: Page, than: int) -> int:
    """The number of updates, once there are more; the page changes by itself."""
    deadline = time.monotonic() + _LONG_MS / 1000
    while (now := updates(page)) <= than:
        assert time.monotonic() < deadline, page.locator("#main").inner_text()
        page.wait_for_timeout(200)
    return now


def stop(page: Page) -> None:
    page.get_by_role("button", name="Stop, saved").click()
    page.get_by_role("button", name="Resume", exact=True).wait_for(timeout=_LONG_MS)
    assert "interrupted" in page.locator("[data-part=head]").inner_text()


def saved_at(folder: Path) -> int:
    """The last update of the run, which must be in its last checkpoint."""
    run = Run.open(folder / "runs" / NAME)
    found = run.latest_checkpoint()
    assert found is not None and run.state() == "interrupted"
    assert found[0] == run.metrics()[-1]["step"]
    return found[0]


def test_a_run_from_the_form(browser: Browser, folder: Path) -> None:
    """Started from the form, watched live, stopped, resumed; it outlives the page and the server."""
    with serving(folder) as server, visiting(browser, server, DESK) as visit:
        page = visit.go("start")
        page.get_by_label("A recipe of this folder").select_option("pretrain.yaml")
        page.get_by_text("The form holds what").wait_for()
        fill(page, "name", NAME)
        fill(page, "train.steps", str(STEPS))
        fill(page, "checkpoint.every_steps", "100000")
        start = page.get_by_role("button", name="Start training")
        page.wait_for_function("() => !document.querySelector('#start-run').disabled")
        page.get_by_text(re.compile("steps: 20_?000")).wait_for()
        assert re.match(r"mule train \S+", page.locator("#start-command").inner_text())
        plan = page.locator("#start-plan")
        plan.get_by_text("updates of 6 rows").wait_for(timeout=_LONG_MS)
        start.click()
        page.get_by_role("link", name="Watch the run").click(timeout=_LONG_MS)
        page.locator("h1", has_text=NAME).wait_for()
        first = wait_for_more(page, 0)
        page.locator(".js-plotly-plot .scatterlayer path").first.wait_for(
            state="attached", timeout=_LONG_MS
        )
        wait_for_more(page, first)
        page.set_viewport_size(PHONE)
        stop(page)
        reached = saved_at(folder)
        assert first < reached < STEPS
        page.get_by_role("button", name="Resume", exact=True).click()
        wait_for_more(page, reached)
        assert server.end() == 130
        visit.complaints.clear()  # the page has lost its server, and says so
        page.get_by_text("not connected").wait_for()
        _outlived(browser, folder, reached)


def _outlived(browser: Browser, folder: Path, before: int) -> None:
    """The run goes on without a server; another one shows it, and stops it."""
    run = Run.open(folder / "runs" / NAME)
    step = run.metrics()[-1]["step"]
    deadline = time.monotonic() + _LONG_MS / 1000
    while run.metrics()[-1]["step"] <= step:
        assert time.monotonic() < deadline and run.state() == "running"
        time.sleep(0.1)
    with serving(folder) as again, visiting(browser, again, PHONE) as visit:
        page = visit.page
        row = page.locator(f'[data-run="{NAME}"]')
        row.get_by_text("running").wait_for()
        row.get_by_role("link").click()
        visit.settled()
        wait_for_more(page, step)
        stop(page)
        assert saved_at(folder) > before
        assert not visit.complaints, "\n".join(visit.complaints)


# ---------------------------------------------------------------- what was found


@_BOTH
def test_the_doctor_finds_the_planted_fault(sized: Visit) -> None:
    """In the list, on the page of the run, and pinned on its curve."""
    page = sized.page
    row = page.locator(f'[data-run="{FAULTY}"]')
    row.get_by_text("2 warnings").wait_for()
    row.get_by_role("link").click()
    sized.settled()
    finding = page.get_by_role("listitem").filter(has_text="(D304)")
    finding.wait_for()
    text = finding.inner_text()
    assert "warm-up takes 40 of 80 updates" in text and "optim.warmup_steps=4" in text
    assert page.get_by_role("listitem").filter(has_text="(D301)").count() == 1
    page.locator(".annotation-text", has_text="D304").first.wait_for()
    finding.get_by_text("Why, and where that comes from").click()
    finding.get_by_text("Source").wait_for()


@_BOTH
def test_two_runs_compared(sized: Visit) -> None:
    page = sized.go("compare")
    for name in (BASE, FAULTY):
        page.get_by_role("checkbox", name=name, exact=True).check()
    page.get_by_role("button", name="Compare runs").click()
    page.get_by_role("heading", name=re.compile(f"{BASE}.*{FAULTY}|{FAULTY}.*{BASE}")).wait_for()
    settings = page.get_by_role("region", name="Settings that differ").inner_text()
    assert "optim.learning_rate" in settings and "0.3" in settings
    paths = page.locator("[data-curves] .scatterlayer .trace")
    page.wait_for_function("() => document.querySelectorAll('[data-curves] .trace').length >= 2")
    assert paths.count() >= 2


@pytest.mark.slow  # test_chat.py talks to two files, without torch
@_BOTH
def test_two_models_side_by_side(sized: Visit) -> None:
    """The model and its quantised file answer the same question, each word with its probability."""
    page = sized.go("chat")
    for name in (CHAT, f"{CHAT}-Q8_0"):
        page.get_by_role("checkbox", name=re.compile(f"^{name} ")).check()
    page.get_by_label("Message").fill("the young king saw")
    page.get_by_role("button", name="Send").click()
    answers = page.locator(".chat-answer")
    answers.nth(1).get_by_text("tokens/s").wait_for(timeout=_LONG_MS)
    for place, name in enumerate((CHAT, f"{CHAT}-Q8_0")):
        text = answers.nth(place).inner_text()
        assert name in text and re.search(r"\d+ tokens, [\d.]+ tokens/s", text), text
    answers.first.locator(".chat-token").first.hover()
    tip = page.get_by_role("tooltip")
    tip.wait_for(timeout=PATIENCE_MS)
    assert "%" in tip.inner_text()
