"""The site of docs/ builds, loads nothing from elsewhere, and every link and anchor in it resolves."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs_pages import ROOT, pages

CONFIG = ROOT / "zensical.toml"
_LOADED = {"script": "src", "link": "href", "img": "src", "source": "src", "iframe": "src"}


def _nav(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for target in entry.values():
            yield from (target,) if isinstance(target, str) else _nav(target)


def test_the_navigation_has_every_page_once() -> None:
    """Those in another language stand in it too, once they are there."""
    listed = list(_nav(tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]["nav"]))
    there = [page.removeprefix("docs/") for page in pages() if page.startswith("docs/")]
    assert len(set(listed)) == len(listed)
    assert sorted(listed) == sorted(there)


class _Page(HTMLParser):
    """What a page of the site loads, links to and offers as anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.images: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        target = found.get(_LOADED.get(tag, ""))
        if target and found.get("rel") not in ("canonical", "next", "prev", "alternate"):
            self.loads.append(target)
        if tag == "a" and (href := found.get("href")):
            self.links.append(href)
        if found.get("style") and "url(" in (found["style"] or ""):
            self.loads.append(found["style"] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("zensical is not installed: make setup")
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(CONFIG, folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def built(site: Path) -> dict[Path, _Page]:
    files = sorted(site.rglob("*.html"))
    return {file: _Page(file.read_text(encoding="utf-8")) for file in files}


def test_there_is_a_page_for_every_page(site: Path) -> None:
    wanted = [page.removeprefix("docs/") for page in pages() if page.startswith("docs/")]
    missing = [page for page in wanted if not (site / page).with_suffix(".html").is_file()]
    assert not missing


def test_nothing_is_loaded_from_elsewhere(site: Path, built: dict[Path, _Page]) -> None:
    wrong = [
        f"{file.name}: {target}"
        for file, page in built.items()
        for target in page.loads
        if re.search(r"(?i)^(https?:)?//|url\(['\"]?(https?:)?//", target)
    ]
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        wrong += [
            f"{sheet.name}: {found}" for found in re.findall(r"url\(['\"]?https?:[^)]*", text)
        ]
        wrong += [f"{sheet.name}: {found}" for found in re.findall(r"@import[^;]*https?:", text)]
    assert not wrong, "\n".join(wrong)


def test_every_link_of_the_site_resolves(site: Path, built: dict[Path, _Page]) -> None:
    wrong = []
    for file, page in built.items():
        if file.name == "404.html":
            continue
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or not target.is_relative_to(site.resolve()):
                wrong.append(f"{file.name}: {link}: nothing there")
            elif parts.fragment and target in built:
                if unquote(parts.fragment) not in built[target].anchors | {"__toc"}:
                    wrong.append(f"{file.name}: {link}: no such heading")
    assert not wrong, "\n".join(wrong)


def test_no_list_or_table_is_swallowed_by_a_paragraph(built: dict[Path, _Page]) -> None:
    """GitHub begins a list without a blank line before it; other Markdown does not."""
    wrong = []
    for file in built:
        text = file.read_text(encoding="utf-8")
        for paragraph in re.findall(r"<p>(.*?)</p>", text, re.DOTALL):
            if re.search(r"^(- |\* |\d+\. |\| )", paragraph, re.MULTILINE):
                wrong.append(f"{file.name}: {paragraph[:120]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_a_browser_asks_for_nothing_else_and_finds_a_word(site: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("chromium or playwright is not installed")
    from playwright.sync_api import sync_playwright

    with _served(site) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 740})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for name in ("index.html", "tuning.html", "is-my-run-healthy.html", "cli.html"):
            page.goto(f"{address}/{name}")
            page.wait_for_load_state("networkidle")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
        page.keyboard.press("Control+k")
        page.keyboard.type("warm-up")
        page.get_by_text("too short", exact=False).first.wait_for(timeout=20_000)
        browser.close()
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked)


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the screen."""
