"""Rules S4 to S10 for every route of the pages: nobody reaches one who may not, and none leads out."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.types import Receive, Scope, Send

from mule.serve.guard import STRICTEST_POLICY
from mule.web import assets, changes
from mule.web.ids import id_of
from mule.web.jobs import Jobs
from mule.web.opening import open_in_browser
from mule.web.site import Site
from tests.serve_case import TOKEN
from tests.serve_sweep import Attempt, Target, attempts, wrong
from tests.web_case import RUN, RunningUi, ui_running, write_run

WEB = Path(assets.__file__).parent
POLICIES = (assets.CONTENT_POLICY, STRICTEST_POLICY)
# Routes that every attempt is made on, and the beginnings of those made on all.
THOROUGHLY = ("/", "/events", "/runs", "/run/{id}", "/start/stop/{id}")
TELLING = (
    *(
        "as it should",
        "host 'evil.example'",
        "origin null",
        "origin http://evil",
        "sec-fetch-site cross",
    ),
    *(
        "method POST",
        "method GET",
        "method DELETE",
        "token in",
        "no token",
        "another token",
        "a cookie",
    ),
    *("a token and more", "a body", "content type 'text/plain'", "headers of"),
)
CANARY = "hf_" + "canary0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a run in it; and beside it what no page may show."""
    place = tmp_path_factory.mktemp("pages")
    work = place / "work"
    write_run(work / "runs")
    (work / "text.txt").write_text("the cat sat on the mat\n" * 20)
    (place / "secret.txt").write_text("the canary of the neighbour\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv("HF_TOKEN", CANARY)
        yield work


@pytest.fixture(scope="module")
def pages(folder: Path) -> Iterator[RunningUi]:
    with ui_running(Site()) as running:
        yield running


def is_writing(route: Any) -> bool:
    return "POST" in (route.methods or ())


def address(path: str) -> str:
    """A good address of the route of this path, as far as there is one in the folder."""
    name = id_of("file/text.txt") if path.startswith("/data/") else RUN
    return path.replace("{kind}", "run").replace("{id}", name)


def is_of_the_page(attempt: Attempt) -> bool:
    """Whether the page itself must refuse it, and not the guard before it."""
    return attempt.label.partition(": ")[2].startswith(("body ", "id "))


def is_of_the_guard(attempt: Attempt) -> bool:
    path, _, label = attempt.label.partition(": ")
    return not is_of_the_page(attempt) and (path in THOROUGHLY or label.startswith(TELLING))


def swept(pages: RunningUi) -> list[Attempt]:
    routes = pages.ui.routes
    bodies: dict[str, dict[str, object]] = {route.path: {} for route in routes if is_writing(route)}
    open_paths = frozenset(route.path for route in assets.routes(pages.ui.site))
    return list(attempts(routes, Target(pages.port, TOKEN, RUN, bodies, open_paths)))


async def _says_yes(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Stands for every page: what comes here has passed the guard."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def test_the_sweep_of_the_guard(folder: Path) -> None:
    """Attempts on every route of the table pass or are refused before a page sees them.

    All of them on some routes, on each of the others those that tell whether it is guarded at all.
    """
    with ui_running(Site()) as pages:
        pages.ui.guard._app = _says_yes
        tried = [attempt for attempt in swept(pages) if is_of_the_guard(attempt)]
        found = [text for attempt in tried if (text := wrong(attempt, pages.port, POLICIES))]
        assert not found, "\n".join(found)
        paths = {attempt.label.partition(": ")[0] for attempt in tried}
        assert paths == {route.path for route in pages.ui.routes} and "/events" in paths


def test_the_sweep_of_the_pages(pages: RunningUi) -> None:
    """No page takes a body that is none, or an id that is none; and nothing is started."""
    tried = [attempt for attempt in swept(pages) if is_of_the_page(attempt)]
    found = [text for attempt in tried if (text := wrong(attempt, pages.port, POLICIES))]
    assert not found, "\n".join(found)


def test_no_page_breaks(pages: RunningUi) -> None:
    """Each answers, or says what is not there; none is a defect, with or without a body."""
    for route in pages.ui.routes:
        if route.path != "/events":
            writes = is_writing(route)
            path = route.path.replace("{id}", "nowhere") if writes else address(route.path)
            status, headers, body = pages.ask(path, {} if writes else None)
            assert status in (200, 400, 404, 409, 422), (path, body)
            assert headers["content-security-policy"] == assets.CONTENT_POLICY
    assert not Jobs().all(), "an empty question started a job"


def test_only_reading_and_writing(pages: RunningUi) -> None:
    """A route reads (GET) or writes (POST), never both; what writes is no GET of a link."""
    for route in pages.ui.routes:
        assert route.methods in ({"GET", "HEAD"}, {"POST"}), route.path


def test_only_the_shell_is_open(pages: RunningUi) -> None:
    """Without the token one sees the shell, its scripts and plotly; no data, and no second door."""
    open_paths = {route.path for route in assets.routes(pages.ui.site)}
    assert all(path == "/" or path.startswith("/static/") for path in open_paths)
    for path in open_paths:
        status, _, body = pages.ask(path, token=None)
        assert status == 200 and RUN.encode() not in body, path
        assert TOKEN.encode() not in body


def test_a_link_of_another_place_opens_the_shell_alone(pages: RunningUi) -> None:
    """Someone may have it among his bookmarks; a frame, a picture or a fetch of a page may not."""
    ask = "GET {} HTTP/1.1\r\nhost: 127.0.0.1\r\nsec-fetch-site: cross-site\r\n{}\r\n"
    navigate, frame = "sec-fetch-mode: navigate\r\n", "sec-fetch-mode: no-cors\r\n"
    authorised = f"authorization: Bearer {TOKEN}\r\n"
    for path, more, status in (
        ("/", navigate, 200),
        ("/", frame, 403),
        ("/static/plotly.js", frame, 403),
        ("/runs", navigate + authorised, 403),
        ("/events", navigate + authorised, 403),
    ):
        with socket.create_connection(("127.0.0.1", pages.port), timeout=10) as connection:
            connection.sendall(ask.format(path, more).encode())
            assert f" {status} ".encode() in connection.recv(100), (path, more)


# ---------------------------------------------------------------- what a page may hold


class _Inline(HTMLParser):
    """Collects what the content policy would refuse, or what leads out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("iframe", "object", "embed", "base", "form") and tag != "form":
            self.found.append(tag)
        if tag == "script" and not (given.get("src") or "").startswith("/static/"):
            self.found.append("an inline script")
        for name, value in attrs:
            if name.startswith("on") or (value or "").strip().lower().startswith("javascript:"):
                self.found.append(f"{tag} {name}")
            leads = name in ("src", "href", "action", "srcset", "poster", "data")
            if leads and re.match(r"(?i)\s*(https?:)?//", value or ""):
                self.found.append(f"{tag} {name}={value}")


def inline(html: str) -> list[str]:
    reader = _Inline()
    reader.feed(html)
    return reader.found


def test_the_policy() -> None:
    policy = dict(part.split(" ", 1) for part in assets.CONTENT_POLICY.split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
    assert policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    assert "unsafe-eval" not in assets.CONTENT_POLICY and "http" not in assets.CONTENT_POLICY


def test_the_reader_sees_what_is_inline() -> None:
    for html in (
        "<script>x</script>",
        "<b onclick='x'>",
        "<a href=' javascript:x'>",
        "<img src='https://x'>",
        "<iframe>",
    ):
        assert inline(html), html
    assert not inline("<a href='#/runs'>Runs</a><button type='button' data-copy='x'>")


@pytest.mark.parametrize(
    "template", sorted((WEB / "templates").glob("*.html")), ids=lambda p: p.name
)
def test_no_template_holds_a_script(template: Path) -> None:
    text = template.read_text()
    assert not inline(re.sub(r"{[%#].*?[%#]}", "", text))
    assert not re.search(r"\|\s*safe\b|autoescape|Markup", text)


@pytest.mark.parametrize("script", sorted((WEB / "static").glob("*.js")), ids=lambda p: p.name)
def test_no_script_makes_html_or_code_of_text(script: Path) -> None:
    lines = script.read_text().splitlines()
    text = "\n".join(line for line in lines if not re.match(r"\s*(//|/?\*)", line))
    for word in (
        *(r"(inner|outer)HTML\s*\+?=[^=]", "insertAdjacentHTML", r"document\.write", r"\beval\("),
        *(
            "srcdoc",
            "createContextualFragment",
            r"document\.cookie",
            "postMessage",
            r"\bFunction\(",
        ),
    ):
        assert not re.search(word, text), word
    assert not re.search(r"""["'`](https?:)?//[a-z]""", text), "an address of another place"


def test_pages_escape_what_they_show(pages: RunningUi) -> None:
    """Text of a run, such as an answer of the model, is never markup."""
    for route in pages.ui.routes:
        if is_writing(route) or route.path == "/events" or route.path.startswith("/static/"):
            continue
        path = address(route.path)
        _, headers, body = pages.ask(path)
        if headers.get("content-type", "").startswith("text/html") and route.path != "/":
            assert not inline(body.decode()), path
            assert b"<script" not in body, path


# ---------------------------------------------------------------- ids and files


@pytest.fixture
def link(folder: Path) -> Iterator[Any]:
    """Makes symbolic links below the working folder, for one test."""
    made: list[Path] = []

    def make(place: str, target: Path) -> Path:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.unlink()
        path.symlink_to(target)
        made.append(path)
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def test_a_link_does_not_lead_out_of_the_folder(pages: RunningUi, folder: Path, link: Any) -> None:
    secret = folder.parent / "secret.txt"
    link("runs/mare", write_run(folder.parent / "elsewhere", "mare").folder)
    holed = write_run(folder / "runs", "holed", num_steps=3)
    link("runs/holed/report.md", secret)
    for run in ("mare", "holed"):
        for route in pages.ui.routes:
            if route.path.startswith("/run/{id}"):
                path = route.path.replace("{id}", run)
                status, _, body = pages.ask(path, {} if is_writing(route) else None)
                error = json.loads(body)["error"]
                assert (status, error["code"]) == (404, "leads_out"), path
                assert "is a link that leads out of runs" in error["message"]
                assert "mule ui --runs " in error["hint"]
    (holed.folder / "report.md").unlink()
    (holed.folder / "checkpoint-00000003").symlink_to(folder.parent)  # on a larger disk, say
    assert pages.ask("/run/holed")[0] == 200
    link("letter.txt", secret)
    assert b"letter.txt" not in pages.ask("/data")[2]
    for path in ("letter.txt", "../secret.txt", str(secret), "runs/mare/recipe.yaml", "~"):
        status, _, body = pages.ask(f"/data/find?path={path}")
        assert (status, json.loads(body)["error"]["code"]) == (422, "bad_path"), path


# ---------------------------------------------------------------- read-only


def test_read_only_refuses_every_writing_route(folder: Path) -> None:
    with ui_running(Site(read_only=True)) as pages:
        writing = [route for route in pages.ui.routes if is_writing(route)]
        for route in writing:
            status, _, body = pages.ask(re.sub(r"{[^}]*}", RUN, route.path), {})
            error = json.loads(body)["error"]
            assert (status, error["code"]) == (403, "read_only"), route.path
            assert "only shows" in error["message"] and "mule ui" in error["hint"]
        assert pages.ask("/runs")[0] == 200
    assert not Jobs().all()


# ---------------------------------------------------------------- secrets


def test_no_secret_is_told(pages: RunningUi) -> None:
    """Neither the token nor one of the environment stands in any answer."""
    for route in pages.ui.routes:
        if is_writing(route) or route.path == "/events":
            continue
        path = address(route.path)
        _, headers, body = pages.ask(path)
        told = body + repr(headers).encode()
        assert CANARY.encode() not in told and TOKEN.encode() not in told, path


def test_a_job_knows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in its environment, its command line or its files, which are this user's alone."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "LD_PRELOAD_X", "PYTHONX"):
        monkeypatch.setenv(name, CANARY)
    jobs = Jobs(tmp_path / ".mule" / "jobs")
    job = jobs.start("look", ["runs", "list", "--json"])
    process = psutil.Process(job.pid)
    environment, command = process.environ(), process.cmdline()
    assert CANARY not in repr(environment) and CANARY not in repr(command)
    assert not [
        name for name in environment if name.startswith(("HF_TOKEN", "WANDB", "AWS", "LD_"))
    ]
    for watcher in jobs._children:
        watcher.wait(60)
    assert jobs.state(job)["state"] == "done", jobs.state(job)["stderr"]
    folder = jobs.folder / job.id
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "others can read the files in it"
    assert not [file for file in folder.iterdir() if CANARY in file.read_text()]


def test_the_file_that_leads_to_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is neither on a command line nor where another user can read it."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    file = tmp_path / "page.html"
    file.write_text("of a server that was killed")
    open_in_browser(f"http://127.0.0.1:1/#token={TOKEN}", file)
    assert opened == [file.as_uri()] and TOKEN not in opened[0]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert f"url=http://127.0.0.1:1/#token={TOKEN}" in file.read_text()


def test_a_started_server_keeps_its_secrets(folder: Path, tmp_path: Path) -> None:
    """`mule ui` itself: its log, its command line, and what it leaves when it ends."""
    log = tmp_path / "log"
    with log.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "mule.cli.main", "ui", "--port", "0", "--json"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=err,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        )
    assert process.stdout is not None
    about = json.loads(process.stdout.readline())
    token = about["open"].partition("#token=")[2]
    token_file = Path(about["token_file"])
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    assert token_file.read_text().strip() == token and token not in about["url"]
    running = RunningUi(None, None, int(about["url"].rpartition(":")[2]))  # type: ignore[arg-type]
    assert running.ask("/runs", token=token)[0] == 200
    assert running.ask(f"/runs?token={token}", token=token)[0] == 400
    assert token not in repr(psutil.Process(process.pid).cmdline())
    process.terminate()
    assert process.wait(10) == 143
    process.stdout.close()
    told = log.read_text()
    assert token not in told and CANARY not in told and "GET /runs 400" in told
    assert not token_file.exists()


# ---------------------------------------------------------------- streams


def listeners(port: int, count: int) -> list[socket.socket]:
    """Connections that hear of changes."""
    ask = f"GET /events HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
    opened = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        connection.sendall(ask.encode())
        opened.append(connection)
    for connection in opened:
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    return opened


def test_many_listeners_cost_one_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred open pages look at the folder no more often than one, and the shell still comes."""
    looks: list[float] = []
    real = changes._stamps

    def counted(site: Site) -> changes.Stamps:
        looks.append(time.monotonic())
        return real(site)

    monkeypatch.setattr(changes, "_stamps", counted)
    with ui_running(Site()) as pages:
        opened = listeners(pages.port, 200)
        started_at, before = time.monotonic(), len(looks)
        time.sleep(2.2)
        seconds = time.monotonic() - started_at
        assert len(looks) - before <= 2 * seconds + 2
        assert pages.ask("/", token=None)[0] == 200
        for connection in opened:
            connection.close()


def test_streams_end_with_the_server(folder: Path) -> None:
    with ui_running(Site()) as pages:
        opened = listeners(pages.port, 3)
        started_at = time.monotonic()
        pages.server.should_exit = True
        for connection in opened:
            connection.settimeout(5)
            while connection.recv(1000):
                pass
            connection.close()
        assert time.monotonic() - started_at < 3


def test_a_change_is_heard_of_by_all(folder: Path) -> None:
    with ui_running(Site()) as pages:
        opened = listeners(pages.port, 2)
        time.sleep(0.1)
        write_run(folder / "runs", "heard", num_steps=3)
        heard = [b"", b""]

        def hear(number: int) -> None:
            while b"run/heard" not in heard[number]:
                heard[number] += opened[number].recv(1000)

        threads = [threading.Thread(target=hear, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert all(b"run/heard" in each for each in heard)
        for connection in opened:
            connection.close()
