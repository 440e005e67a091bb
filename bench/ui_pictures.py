"""The pictures of README and docs/ui.md: `python -m bench.ui pictures`.

They are taken of the folder that the browser tests work in: tiny runs, trained and exported by Mule's
own commands (tests/browser/workplace.py), one of them with a planted fault.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.browser.visitor import PHONE, Served, Visit, launched, serving, visiting
from tests.browser.workplace import BASE, CHAT, FAULTY, FLAWED_DATA, GGUF, kept_workplace

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, ViewportSize

DESK: ViewportSize = {"width": 1280, "height": 800}
LOWER: ViewportSize = {"width": 1280, "height": 640}
LOW: ViewportSize = {"width": 1280, "height": 300}
_LOADING_MS = 240_000  # of models and of plans, on a busy machine
_MOMENT_MS = 1_500  # until charts have come to rest


def take(images: Path) -> None:
    """Every picture, as a PNG in `images`."""
    images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mule-pictures-") as name:
        folder = Path(name) / "models"
        shutil.copytree(kept_workplace(), folder)
        verify = [sys.executable, "-m", "mule.cli.main", "verify", GGUF]
        subprocess.run(verify, cwd=folder, stdout=subprocess.DEVNULL, check=False)
        with serving(folder) as served, launched() as browser:
            picture = partial(_picture, browser, served, images)
            picture("runs", _runs, size=LOW)
            picture("run", _run)
            picture("run-dark", _run, theme="dark")
            picture("start", _start, size=LOWER)
            picture("data", _data)
            picture("compare", _compare)
            picture("export", _export)
            picture("chat", _chat, size=LOWER)
            picture("phone", _run, size=PHONE)


def _picture(
    browser: Browser,
    served: Served,
    images: Path,
    name: str,
    show: Callable[[Visit], Page],
    *,
    size: ViewportSize = DESK,
    theme: str = "light",
) -> None:
    file = images / f"ui-{name}.png"
    with visiting(browser, served, size, theme) as visit:
        page = show(visit)
        page.wait_for_timeout(_MOMENT_MS)
        page.screenshot(path=file)
    print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


def _runs(visit: Visit) -> Page:
    page = visit.go("runs")
    page.get_by_text("2 warnings").wait_for()
    return page


def _run(visit: Visit) -> Page:
    page = visit.go(f"run/{FAULTY}")
    page.locator(".annotation-text").first.wait_for()
    return page


def _start(visit: Visit) -> Page:
    page = visit.go(f"start?run={CHAT}")
    page.locator("#start-plan").get_by_text("updates of").wait_for(timeout=_LOADING_MS)
    page.locator("#start-form").scroll_into_view_if_needed()
    return page


def _data(visit: Visit) -> Page:
    page = visit.go("data")
    page.get_by_role("link", name=FLAWED_DATA).first.click()
    page.locator("[data-rows][aria-busy=false] article").first.wait_for(timeout=_LOADING_MS)
    page.locator("[data-report] [data-state=done]").wait_for(timeout=_LOADING_MS)
    return page


def _compare(visit: Visit) -> Page:
    page = visit.go("compare")
    for name in (BASE, FAULTY):
        page.get_by_role("checkbox", name=name, exact=True).check()
    page.get_by_role("button", name="Compare runs").click()
    page.locator("[data-curves] .trace").first.wait_for(state="attached")
    page.locator("[data-result]").evaluate("(result) => result.scrollIntoView()")
    return page


def _export(visit: Visit) -> Page:
    page = visit.go("export")
    page.get_by_role("link", name=CHAT).first.click()
    return visit.settled()


def _chat(visit: Visit) -> Page:
    page = visit.go("chat")
    for kind in ("F16", "Q8_0"):
        page.locator(f"#chat-choice input[data-title='{CHAT}-{kind}']").check()
    page.locator("#chat-settings summary").click()
    page.get_by_label("temperature").fill("1")
    page.locator("#chat-settings summary").click()
    page.get_by_label("Message").fill("The young king saw a red bird.")
    page.get_by_role("button", name="Send").click()
    page.locator(".chat-answer").nth(1).get_by_text("tokens/s").wait_for(timeout=_LOADING_MS)
    page.locator("#chat-models > summary").click()
    page.locator(".chat-token").first.focus()
    return page
