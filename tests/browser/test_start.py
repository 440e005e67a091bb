"""The page Start as a person uses it: problems at their fields, the plan, remedies, labels, recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.browser.visitor import DESK, PHONE, Visit

if TYPE_CHECKING:
    from playwright.sync_api import Page, ViewportSize

_PLAN_MS = 60_000  # the first one reads the data, on a busy machine


def fill(page: Page, key: str, value: str) -> None:
    """Type into the field of this key, in whichever section it is."""
    field = page.locator(f'[id="field-{key}"]')
    field.evaluate("(field) => { const d = field.closest('details'); if (d) d.open = true; }")
    field.fill(value)


def begun(visit: Visit) -> Page:
    page = visit.go("start")
    page.get_by_label("A recipe of this folder").select_option("pretrain.yaml")
    page.locator("#start-plan .fit").wait_for(timeout=_PLAN_MS)
    return page


def test_a_problem_stands_at_its_field_until_it_is_corrected(visit: Visit) -> None:
    page = begun(visit)
    fill(page, "train.steps", "0")
    wrong = page.locator('[id="wrong-train.steps"]')
    wrong.wait_for()
    assert wrong.inner_text() == "expected a whole number of at least 1, found 0"
    steps = page.locator('[id="field-train.steps"]')
    assert steps.get_attribute("aria-invalid") == "true"
    assert page.locator("#start-run").is_disabled()
    assert not page.locator("#start-ready").is_visible(), "a command that cannot run is offered"
    fill(page, "train.steps", "12")
    wrong.wait_for(state="hidden")
    page.locator("#start-ready").wait_for()
    page.get_by_text("12 updates of 6 rows").wait_for(timeout=_PLAN_MS)
    assert "steps: 12" in page.locator("#start-yaml").inner_text()
    page.reload()
    visit.settled()
    assert steps.input_value() == "12"  # what was typed outlives a reload


def test_a_remedy_is_applied_by_one_click(visit: Visit) -> None:
    page = begun(visit)
    for key, value in (("hidden_size", "16384"), ("num_layers", "80"), ("num_heads", "64")):
        fill(page, f"model.{key}", value)
    fill(page, "model.num_kv_heads", "")
    fill(page, "model.head_dim", "")
    fill(page, "model.intermediate_size", "")
    page.locator("#start-plan span.fit-does-not-fit").wait_for(timeout=_PLAN_MS)
    remedy = page.locator("#start-plan li").filter(has_text="train.micro_batch_rows=1").first
    remedy.get_by_role("button").click()
    rows = page.locator('[id="field-train.micro_batch_rows"]')
    assert rows.input_value() == "1"
    page.get_by_text("micro_batch_rows: 1").wait_for()


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_labels_and_recipes_at_both_widths(
    visit: Visit, size: ViewportSize, axe: Callable[[Page], list[str]]
) -> None:
    page = begun(visit)
    page.set_viewport_size(size)
    fill(page, "data.train", "chats.jsonl")
    page.get_by_text("See which words are learned").click()
    page.locator("#start-rows mark.learned").first.wait_for(timeout=_PLAN_MS)
    page.get_by_text("A recipe that comes with Mule").click()
    page.locator("#mule-recipes-list li").first.wait_for(timeout=_PLAN_MS)
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, f"the page is {wide} pixels too wide"
    assert not (found := axe(page)), "\n".join(found)
    visit.go("jobs")
    assert not (found := axe(page)), "\n".join(found)
