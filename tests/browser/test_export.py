"""The page Export in a browser: the form, the command, the table and the plot of one export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mule.export.record import read_record, record_checks
from tests.browser.visitor import PHONE, Served, Visit
from tests.browser.workplace import ADAPTER, GGUF

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

CHECK = {
    "ok": True,
    "verdict": "same perplexity: fine",
    "kl_mean": 1e-4,
    "top1": 0.99,
    "ppl": 9.1,
    "ppl_reference": 9.0,
}
_WIDER = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


def test_the_form_shows_the_command_of_what_is_chosen(visit: Visit) -> None:
    page = visit.go("export")
    page.get_by_label("Model", exact=True).select_option(label_of(page, ADAPTER))
    command = page.locator("#export-command")
    page.get_by_label("q6_k").check()
    page.get_by_label("q8_0").uncheck()
    page.wait_for_function(
        "() => document.querySelector('#export-command').textContent.endsWith('q6_k,q4_k_m')"
    )
    page.get_by_label("merge only").check()
    page.wait_for_function(
        "() => document.querySelector('#export-command').textContent.startsWith('mule merge')"
    )
    assert command.inner_text() == f"mule merge runs/{ADAPTER}"
    assert not page.locator("#export-types").is_visible()
    page.get_by_label("GGUF files").check()
    for type_name in ("q6_k", "q4_k_m"):
        page.get_by_label(type_name).uncheck()
    page.get_by_role("alert").wait_for()
    assert "hint: choose one" in page.get_by_role("alert").inner_text()
    visit.forgive("422")


def label_of(page: Page, name: str) -> str:
    labels = page.locator("#export-model option").all_inner_texts()
    return next(label for label in labels if label.startswith(f"{name}, "))


def test_an_export_with_its_table_and_plot(
    visit: Visit, server: Served, axe: Callable[[Page], list[str]]
) -> None:
    folder = server.folder / GGUF
    record = read_record(folder)
    assert record is not None
    record_checks(folder, {entry["file"]: CHECK for entry in record["files"]})
    page = visit.go("export")
    page.get_by_role("link", name=GGUF).click()
    page.locator("#export-chart .point").first.wait_for()
    table = page.locator("#export-files").inner_text()
    assert "99.00%" in table and "1.0e-04" in table and "9.1" in table
    page.locator("#export-chart .textpoint").nth(len(record["files"]) - 1).wait_for()
    page.get_by_label("Quality as").select_option("ppl")
    page.get_by_text("the model", exact=True).wait_for()
    assert "ollama create" in page.locator("#export-run").inner_text()
    assert not axe(page)
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(300)
    assert page.evaluate(_WIDER) <= 0
    page.get_by_role("link", name="Chat with it here").click()
    page.locator("#chat-choice input:checked").wait_for()
    assert page.locator("#chat-choice input:checked").count() == 1
