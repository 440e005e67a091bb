"""The pages Runs and Run as a person uses them: live, zoomed, read by keyboard, stopped, resumed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from mule.run import Run
from tests.browser.visitor import PATIENCE_MS, PHONE, Visit
from tests.browser.workplace import BASE, FAULTY

_SLOW_MS = 4 * PATIENCE_MS  # what a job does first: it imports torch


def _open(visit: Visit, name: str, options: str = "") -> Page:
    page = visit.go(f"run/{name}{options}")
    page.wait_for_selector("[data-chart=loss] .main-svg", timeout=PATIENCE_MS)
    page.wait_for_selector("#findings-title", timeout=PATIENCE_MS)
    page.wait_for_selector("[data-part=about] h2", timeout=PATIENCE_MS)
    return page


def _until(page: Page, told: str) -> None:
    """Wait for it without a script in the page, which the content policy refuses."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(told):
        assert time.monotonic() < deadline, told
        page.wait_for_timeout(50)


def _as_base(folder: Path, name: str, num_steps: int) -> Run:
    """A run of the recipe of the first one, so many updates long, that nobody has begun."""
    base = folder / "runs" / BASE
    run = Run.create(folder / "runs", name, (base / "recipe.yaml").read_text())
    resolved = (base / "resolved.yaml").read_text()
    run.write_resolved(resolved.replace("steps: 60\n", f"steps: {num_steps}\n"))
    return run


def test_the_list_shows_runs_and_the_doctors_verdicts(visit: Visit) -> None:
    page = visit.go("runs")
    row = page.locator(f"tr[data-run={FAULTY}]")
    expect(row).to_contain_text("finished")
    expect(row.locator("[data-verdict]")).to_contain_text(re.compile("alarm|warning"))
    row.get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(FAULTY)


def test_a_run_from_elsewhere_appears_and_moves_by_itself(visit: Visit, folder: Path) -> None:
    page = visit.go("runs")
    run = _as_base(folder, "elsewhere", 90)
    with run.lock():
        run.start_attempt(from_step=0)
        row = page.locator("tr[data-run=elsewhere]")
        expect(row).to_contain_text("running")
        for step in range(1, 31):
            run.log_metrics({"step": step, "loss": 3.0, "steps_per_second": 2.0})
        expect(row).to_contain_text("30 of 90")
        expect(row).to_contain_text("30 s")
        page = _open(visit, "elsewhere")
        for step in range(31, 46):
            run.log_metrics({"step": step, "loss": 3.0, "steps_per_second": 2.0})
        expect(page.locator("[data-part=head]")).to_contain_text("45 of 90")
    expect(page.locator("[data-part=head]")).to_contain_text("killed")


def test_a_drag_zooms_all_charts_and_a_reload_keeps_the_view(visit: Visit) -> None:
    page = _open(visit, BASE)
    box = page.locator("[data-chart=loss] .nsewdrag").first.bounding_box()
    assert box is not None
    across = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, across)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, across + 3, steps=6)
    page.mouse.up()
    expect(page).to_have_url(re.compile("from="))
    _until(
        page,
        """() => {
        const range = (name) => document.querySelector(`[data-chart=${name}]`).layout.xaxis.range;
        return range('loss')[0] > 5 && range('loss').join() === range('grad_norm').join(); }""",
    )
    place = page.evaluate("location.hash")
    page.reload()
    visit.settled()
    page.wait_for_selector("[data-chart=loss] .main-svg")
    assert page.evaluate("location.hash") == place
    assert float(page.get_by_label("From").input_value()) > 5
    page.get_by_role("button", name="Whole run").click()
    expect(page).not_to_have_url(re.compile("from="))


def test_the_range_and_the_axes_are_reached_without_a_mouse(visit: Visit) -> None:
    page = _open(visit, BASE)
    page.get_by_label("From").fill("10")
    page.get_by_label("to", exact=True).fill("20")
    page.get_by_label("to", exact=True).press("Enter")
    expect(page).to_have_url(re.compile("from=10&to=20"))
    page.get_by_label("Along").select_option("tokens")
    expect(page).to_have_url(re.compile("x=tokens"))
    page.get_by_label("log axis").check()
    chart = "document.querySelector('[data-chart=loss]').layout"
    _until(page, f"{chart}.yaxis.type === 'log'")
    assert page.evaluate(f"{chart}.xaxis.title.text") == "trained tokens"
    page.get_by_label("Smoothing").press("End")
    expect(page.locator("output[name=window]")).to_have_text("mean of 60 updates")


def test_a_finding_is_pinned_on_its_curve_and_leads_to_its_rule(visit: Visit) -> None:
    page = _open(visit, FAULTY)
    pin = page.locator(".charts g.annotation").first
    expect(pin).to_be_visible()
    code = pin.locator("text").first.text_content()
    pin.locator(".annotation-text-g").click()
    expect(page.locator(f"#rule-{code}")).to_have_attribute("open", "")
    expect(page.locator(f"#rule-{code}")).to_contain_text("Why it matters")


def test_samples_recipe_and_files_are_there(visit: Visit) -> None:
    page = _open(visit, BASE)
    expect(page.locator("[data-part=samples]")).to_contain_text("the young king saw")
    page.get_by_text("As it was run").click()
    expect(page.get_by_role("region", name="Settings")).to_contain_text("train.steps")
    expect(page.get_by_role("region", name="Files")).to_contain_text("metrics.jsonl")


@pytest.mark.slow
def test_a_run_is_resumed_and_stopped_with_the_buttons(visit: Visit, folder: Path) -> None:
    run = _as_base(folder, "long", 100_000)
    page = visit.go("run/long")
    page.get_by_role("button", name="Resume").click()
    stop = page.get_by_role("button", name="Stop, saved")
    expect(stop).to_be_visible(timeout=_SLOW_MS)
    page.wait_for_selector("[data-chart=loss] .main-svg", timeout=_SLOW_MS)
    page.reload()
    visit.settled()
    stop.click()
    expect(page.locator("[data-part=head]")).to_contain_text("interrupted", timeout=_SLOW_MS)
    assert run.latest() is not None
    assert [event["kind"] for event in run.events()][-1] == "interrupted"


def test_axe_finds_nothing(visit: Visit, axe: Callable[[Page], list[str]]) -> None:
    assert not (found := axe(_open(visit, FAULTY))), "\n".join(found)
    assert not (found := axe(visit.go("runs"))), "\n".join(found)
    visit.page.get_by_role("button", name="Use dark colours").click()
    assert not (found := axe(_open(visit, FAULTY))), "\n".join(found)


def test_the_page_fits_a_phone(visit: Visit) -> None:
    visit.page.set_viewport_size(PHONE)
    page = _open(visit, FAULTY)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page = visit.go("runs")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
