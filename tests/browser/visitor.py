"""Who visits the pages in these tests: chromium, a server of its own, and an ear for complaints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, ViewportSize

PHONE: ViewportSize = {"width": 360, "height": 740}
DESK: ViewportSize = {"width": 1920, "height": 1080}
PATIENCE_MS = 15_000  # on a busy machine; pages themselves answer in a fraction of a second
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--no-sandbox",  # containers have no user namespaces; nothing but our own pages is opened
    "--disable-gpu",
    "--disable-domain-reliability",
    "--no-pings",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # it cannot call home
)
_LOCAL_SCHEMES = ("data", "blob", "about")
_TELL_VIOLATIONS = """addEventListener("securitypolicyviolation", (event) =>
  console.error(`policy: ${event.violatedDirective} refused ${event.blockedURI}`))"""
_GO = """(place) => new Promise((resolve) => {
  if (location.hash === `#/${place}`) return resolve();
  addEventListener("hashchange", () => resolve(), { once: true });
  location.hash = `#/${place}`;
})"""


def missing() -> str:
    """What a browser test lacks here, "" when it can run."""
    if chromium() is None:
        return "no chromium on PATH (Debian: apt install chromium)"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (make setup)"
    return ""


def chromium() -> str | None:
    """The system's chromium."""
    return next((path for name in _CHROMIUM if (path := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """Chromium without a window, which resolves no name."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(_FLAGS))
        yield browser
        browser.close()


# ---------------------------------------------------------------- the server


@dataclass
class Served:
    """A `mule ui` that runs: its folder, address, and the address with the token."""

    folder: Path
    url: str
    open: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def token(self) -> str:
        return self.open.partition("#token=")[2]

    def jobs(self) -> list[dict[str, Any]]:
        """What job.json says of each job that was started here."""
        files = sorted(self.folder.glob(".mule/jobs/*/job.json"))
        return [json.loads(file.read_text()) for file in files]

    def end(self) -> int:
        """Stop the server, as Ctrl-C does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@contextmanager
def serving(folder: Path, *words: str, log: Path | None = None) -> Iterator[Served]:
    """`mule ui` in `folder` as a process of its own; at the end its jobs are ended too."""
    command = [sys.executable, "-m", "mule.cli.main", "ui", "--port", "0", "--json", *words]
    log = log or folder / "server.log"
    with log.open("a") as err:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=err, text=True
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, log.read_text()
    about = json.loads(line)
    served = Served(folder, about["url"], about["open"], process, log)
    try:
        yield served
    finally:
        served.end()
        process.stdout.close()
        for job in served.jobs():
            _end_session(job["pid"])


def _end_session(pid: int) -> None:
    """A job leads a session of its own."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it had ended


# ---------------------------------------------------------------- the visit


@dataclass
class Visit:
    """A page of a server, and what went wrong on it that nobody sees.

    `complaints` are requests that left the server, errors on the console or of a script, and
    violations of the content policy.
    """

    page: Page
    served: Served
    complaints: list[str] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("request", lambda request: self._check_address(request.url))
        self.page.on("websocket", lambda socket: self.complaints.append(f"opened {socket.url}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"script: {error}"))
        self.page.on(
            "console",
            lambda said: self.complaints.append(said.text) if said.type == "error" else None,
        )

    def _check_address(self, url: str) -> None:
        parts = urlsplit(url)
        own = urlsplit(self.served.url)
        if (parts.scheme, parts.netloc) != (own.scheme, own.netloc):
            if parts.scheme not in _LOCAL_SCHEMES:
                self.complaints.append(f"asked for {url}, which is not this server")

    def forgive(self, words: str) -> None:
        """Take back the complaints that hold these words; they must have come."""
        kept = [said for said in self.complaints if words not in said]
        assert len(kept) < len(self.complaints), f"nothing said {words!r}: {self.complaints}"
        self.complaints[:] = kept

    def go(self, place: str) -> Page:
        """Show the page at this address behind `#/`, whole."""
        self.page.evaluate(_GO, place)
        return self.settled()

    def settled(self) -> Page:
        """The page, once it is no longer loading."""
        self.page.wait_for_selector("#main[aria-busy=false] h1", timeout=PATIENCE_MS)
        return self.page


@contextmanager
def visiting(
    browser: Browser, served: Served, size: ViewportSize = DESK, theme: str = "light"
) -> Iterator[Visit]:
    """A person who opens the address that `mule ui` printed."""
    scheme = "dark" if theme == "dark" else "light"
    context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
    context.set_default_timeout(PATIENCE_MS)
    context.add_init_script(_TELL_VIOLATIONS)
    visit = Visit(context.new_page(), served)
    visit.listen()
    visit.page.goto(served.open)
    visit.settled()
    try:
        yield visit
    finally:
        context.close()
