"""The page Chat in a browser: two models side by side, token by token, as a person talks to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.browser.visitor import PHONE, Visit
from tests.browser.workplace import CHAT

if TYPE_CHECKING:
    from playwright.sync_api import Page

LOADING_MS = 90_000
_WIDER = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# The answer is stopped at its first token: the script is as quick as the model.
_STOP_AT_ONCE = """() => new Promise((done) => {
  const find = (id) => document.getElementById(id);
  const seen = new MutationObserver(() => {
    if (!document.querySelectorAll(".chat-turn")[1]?.querySelector(".chat-token")) return;
    seen.disconnect();
    find("chat-stop").click();
    done();
  });
  seen.observe(find("chat-said"), { subtree: true, childList: true });
  find("chat-send").click();
})"""
_FILES = (f"{CHAT}-F16", f"{CHAT}-Q8_0")  # in llama.cpp: loaded without torch


def choose(page: Page, *titles: str) -> None:
    for title in titles:
        page.locator(f"#chat-choice input[data-title='{title}']").check()


def test_two_models_side_by_side(visit: Visit, axe: Callable[[Page], list[str]]) -> None:
    page = visit.go("chat")
    choose(page, *_FILES)
    assert "2 chosen" in page.locator("#chat-memory").inner_text()
    page.locator("#chat-settings summary").click()
    page.get_by_label("temperature").fill("0")
    page.get_by_label("max_tokens").fill("12")
    page.get_by_label("Message").fill("the <b>young</b> king")
    page.get_by_label("Message").press("Enter")
    page.locator(".chat-differs").wait_for(timeout=LOADING_MS)
    assert page.locator(".chat-question").inner_text() == "the <b>young</b> king"
    answers = page.locator(".chat-answer")
    assert answers.count() == 2
    for number, title in enumerate(_FILES):
        told = answers.nth(number).inner_text()
        assert told.startswith(title) and "tokens/s, first after" in told

    # What else was likely: under the mouse, and by the keyboard.
    card = page.get_by_role("tooltip")
    page.locator(".chat-token").first.hover()
    assert "drawn" in card.inner_text() and "%" in card.inner_text()
    page.mouse.move(0, 0)
    page.locator(".chat-token").first.focus()
    first = card.inner_text()
    page.keyboard.press("ArrowRight")
    assert card.is_visible() and card.inner_text() != first
    page.keyboard.press("Escape")
    assert not card.is_visible()
    assert not axe(page)
    page.set_viewport_size(PHONE)
    assert page.evaluate(_WIDER) <= 0
    assert not axe(page)

    # It survives a refresh, with the models still open.
    texts = page.locator(".chat-tokens").all_inner_texts()
    page.reload()
    visit.settled()
    assert page.locator(".chat-tokens").all_inner_texts() == texts
    page.get_by_text(f"open: {', '.join(_FILES)}").wait_for()

    retried_with_another_seed(page)
    saved_as_training_data(page, visit)
    stopped(page)


def retried_with_another_seed(page: Page) -> None:
    page.locator("#chat-settings summary").click()
    page.get_by_label("temperature").fill("1.5")
    page.get_by_role("button", name="Retry with another seed").click()
    page.locator("#chat-stop:disabled").wait_for()
    page.locator(".chat-answer").nth(1).get_by_text("tokens/s").wait_for()
    assert page.get_by_label("seed", exact=True).input_value() == "1"
    assert page.locator(".chat-turn").count() == 1


def saved_as_training_data(page: Page, visit: Visit) -> None:
    page.locator("#chat-keep summary").click()
    page.get_by_label("File, below this folder").fill("said.jsonl")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text("saved; said.jsonl has").wait_for()
    text = (visit.served.folder / "said.jsonl").read_text()
    rows = [json.loads(row) for row in text.splitlines()]
    assert rows[0]["messages"][0] == {"role": "user", "content": "the <b>young</b> king"}
    assert rows[0]["messages"][1]["role"] == "assistant"


def stopped(page: Page) -> None:
    page.get_by_label("max_tokens").fill("200")
    page.get_by_label("Message").fill("the king of the hill")
    page.evaluate(_STOP_AT_ONCE)
    page.locator("#chat-stop:disabled").wait_for()
    assert page.locator(".chat-turn").nth(1).locator(".chat-answer").count() == 1
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".chat-turn").count() == 0
    page.get_by_role("button", name="Close").click()
    page.locator("#chat-state").get_by_text("closed").wait_for()


def test_nothing_chosen_is_said(visit: Visit) -> None:
    page = visit.go("chat")
    page.get_by_label("Message").fill("Hello")
    page.get_by_label("Message").press("Enter")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "no model is chosen" in alert.inner_text()
    assert "hint: tick one or several under Models" in alert.inner_text()
    page.evaluate("() => sessionStorage.clear()")
