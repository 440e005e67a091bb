"""Runs started from the pages, by a real server that is killed, and by its successor."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mule.run import Run
from mule.web.jobs import Jobs
from tests.life.tiny_life import kill, outcome, write_data

pytestmark = pytest.mark.slow

UI = [sys.executable, "-m", "mule.cli.main", "ui", "--port", "0", "--json"]
PATIENCE_S = 240


class Server:
    """`mule ui` in a folder, as a process."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(UI, cwd=folder, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        about = json.loads(self.process.stdout.readline())
        self._host = about["url"].removeprefix("http://")
        self._token = about["open"].partition("#token=")[2]

    def ask(self, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection(self._host, timeout=60)
        headers = {"authorization": f"Bearer {self._token}", "content-type": "application/json"}
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, content, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        assert response.status == 200, text
        return json.loads(text) if response.headers["content-type"] == "application/json" else text

    def kill(self) -> None:
        kill(self.process.pid)
        assert self.process.wait(20) == -signal.SIGKILL
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def test_killing_the_server_harms_no_run(tmp_path: Path) -> None:
    write_data(tmp_path)
    jobs = Jobs(tmp_path / ".mule" / "jobs")
    first, second = Run(tmp_path / "runs" / "first"), Run(tmp_path / "runs" / "second")

    def ended(job: str) -> dict[str, Any]:
        until(lambda: jobs.state(jobs.get(job))["state"] != "running")
        return jobs.state(jobs.get(job))

    with serving(tmp_path) as server:
        values = server.ask("/start/from/own/pretrain.yaml")["values"] | {"train.steps": "150"}
        job = server.ask("/start/run", {"values": {**values, "name": "first"}})["job"]
        until(lambda: len(first.metrics()) > 3)
        server.kill()
        assert first.state() == "running"
        assert ended(job)["how"] == "ended well"
        assert first.state() == "finished" and len(first.metrics()) == 150

    with serving(tmp_path) as server:  # another server, the same folder
        assert "ended well" in server.ask(f"/jobs/{job}")
        job = server.ask("/start/run", {"values": {**values, "name": "second"}})["job"]
        until(lambda: len(second.metrics()) > 3)
        server.ask("/start/stop/second", {})  # as a run of a terminal is stopped
        assert ended(job)["how"] == "stopped on request"
        assert second.state() == "interrupted" and len(second.metrics()) < 150
        assert "everything is saved in runs/second" in server.ask(f"/jobs/{job}")
        job = server.ask("/start/resume/second", {})["job"]
        until(lambda: second.state() == "running")
        server.kill()
        assert ended(job)["how"] == "ended well"
    assert outcome(first.folder) == outcome(second.folder)
