"""The models that the chat page talks to: one `mule serve` at a time, a child of this server.

It ends with the server, however that ends (rule S5), and when nobody asked for a while. Its token is
read from its file, and neither the token nor its address is ever shown.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mule.serve.problem import Problem, shown
from mule.web.jobs import environment

MAX_MODELS = 4
IDLE_SECONDS = 900.0
_LOOK_SECONDS = 1.0
_END_SECONDS = 15.0
_ANSWER_SECONDS = 3_600.0
_TAIL_BYTES, _PIECE_BYTES = 16 * 1024, 64 * 1024


@dataclass(frozen=True)
class Chosen:
    """A model of the set: the id that requests name it by, what `mule serve` takes, its title."""

    id: str
    source: str
    title: str


class Engines:
    """The open set of models, if there is one."""

    def __init__(self, idle_seconds: float = IDLE_SECONDS) -> None:
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._why = ""

    def open(self, chosen: Sequence[Chosen]) -> None:
        """Begin to load these; another set is closed first, for its memory."""
        with self._lock:
            if self._child and self._child.chosen == tuple(chosen) and self._child.is_alive:
                return
            self._end("")
            self._child = _Child(chosen)
            threading.Thread(target=self._watch, args=(self._child,), daemon=True).start()

    def close(self, why: str = "") -> None:
        """End the child, if there is one; `why` is told to the page."""
        with self._lock:
            self._end(why)

    def state(self) -> dict[str, Any]:
        """closed, loading, open or failed; the models, and what their process said."""
        with self._lock:
            if self._child is None:
                return {"state": "closed", "models": [], "said": "", "why": self._why}
            return self._child.state()

    def ask(self, id: str, body: dict[str, Any]) -> Answer:
        """Send a request for an answer to a model that is open; read it piece by piece.

        Problem 409 where it is not open.
        """
        with self._lock:
            started = self._child.started() if self._child and self._child.is_alive else None
            if self._child is None or started is None or id not in started["models"]:
                raise Problem(
                    409,
                    f"{shown(id)} is not open",
                    code="not_open",
                    hint="choose the models and press Open",
                )
            child = self._child
        path = "chat/completions" if id in started["chat"] else "completions"
        return Answer(child, started, path, {"model": id, **body})

    def _end(self, why: str) -> None:
        if self._child is not None:
            self._child.end()
        self._child, self._why = None, why

    def _watch(self, child: _Child) -> None:
        """End it when nobody has asked for a while."""
        while child.is_alive:
            time.sleep(min(_LOOK_SECONDS, self._idle_seconds))
            with self._lock:
                if self._child is not child:
                    return
                if child.idle_seconds >= self._idle_seconds:
                    self._end(f"closed after {self._idle_seconds / 60:g} minutes without use")


class _Child:
    """One `mule serve`."""

    def __init__(self, chosen: Sequence[Chosen]) -> None:
        self.chosen = tuple(chosen)
        self._token, self._began_at = "", time.monotonic()
        self._lock, self._num_asked, self._used_at = threading.Lock(), 0, time.monotonic()
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        names = [word for model in chosen for word in ("--name", model.id)]
        serve = ["serve", "--port", "0", "--max-rows", "1", "--json", *names]
        command = [sys.executable, "-m", "mule.cli.main", *serve, "--"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mule.web.owned_process", *command, *(m.source for m in chosen)],
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=self._err,
            env=environment(),
            start_new_session=True,
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def idle_seconds(self) -> float:
        """Since the last answer ended; none while one is under way, or the models are loaded."""
        busy = self._num_asked or self.started() is None
        return 0.0 if busy else time.monotonic() - self._used_at

    def started(self) -> dict[str, Any] | None:
        """What it said as soon as it listened: url, token_file, models, chat."""
        lines = _head(self._out).splitlines(keepends=True)
        if not lines or not lines[0].endswith("\n"):
            return None
        found = json.loads(lines[0])
        return found if "url" in found else None

    def token(self, started: dict[str, Any]) -> str:
        if not self._token:
            self._token = Path(started["token_file"]).read_text(encoding="utf-8").strip()
        return self._token

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """It is in use inside the block."""
        with self._lock:
            self._num_asked += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_asked -= 1
                self._used_at = time.monotonic()

    def state(self) -> dict[str, Any]:
        started = self.started()
        chats = started["chat"] if started else ()
        models = [{"id": m.id, "title": m.title, "chat": m.id in chats} for m in self.chosen]
        found = {"models": models, "said": _tail(self._err), "why": ""}
        if self.is_alive:
            seconds = time.monotonic() - self._began_at
            return {"state": "open" if started else "loading", **found, "seconds": seconds}
        return {"state": "failed", **found, "error": self._failure()}

    def end(self) -> None:
        """Close the pipe that it lives by, and wait; by force where it does not end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._out.close()
        self._err.close()

    def _failure(self) -> dict[str, str]:
        """The error and its hint as the command wrote them; the signal where it wrote none."""
        for line in reversed(_head(self._out).splitlines()):
            found = json.loads(line)
            if "error" in found:
                return {"message": found["error"], "hint": found["hint"]}
        code = self._process.returncode
        if code == 128 + signal.SIGKILL:
            return {
                "message": "the system killed the models' process, as it does when memory is full",
                "hint": "open fewer models, or smaller ones",
            }
        return {
            "message": f"the models' process ended with exit code {code}",
            "hint": "what it wrote last stands below; open the models again",
        }


class Answer:
    """One answer under way: the status, and server-sent events until `read` gives nothing."""

    def __init__(
        self, child: _Child, started: dict[str, Any], path: str, body: dict[str, Any]
    ) -> None:
        address = urlsplit(started["url"])
        self._use = contextlib.ExitStack()
        self._socket: socket.socket | None = None
        self._use.enter_context(child.asked())
        self._connection = http.client.HTTPConnection(
            str(address.hostname), address.port, timeout=_ANSWER_SECONDS
        )
        headers = {
            "Authorization": f"Bearer {child.token(started)}",
            "Content-Type": "application/json",
        }
        try:
            self._connection.request("POST", f"{address.path}/{path}", json.dumps(body), headers)
            self._socket = self._connection.sock
            self._response = self._connection.getresponse()
        except (OSError, http.client.HTTPException):
            self.close()
            raise Problem(
                502,
                "the models' process does not answer",
                code="no_answer",
                hint="open the models again",
            ) from None
        self.status = self._response.status

    def read(self) -> bytes:
        """What has come since; nothing at the end, and after `close`."""
        try:
            return self._response.read1(_PIECE_BYTES)
        except (OSError, ValueError, http.client.HTTPException):
            return b""

    def close(self) -> None:
        """Leave: the model stops answering. From any thread, and more than once."""
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._use.close()


def _head(file: Any) -> str:
    return os.pread(file.fileno(), _PIECE_BYTES, 0).decode(errors="replace")


def _tail(file: Any) -> str:
    size = os.fstat(file.fileno()).st_size
    found = os.pread(file.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    return found.decode(errors="replace")
