"""A server in this process, around an engine whose pace the tests set."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mule.errors import ModelError, UserError
from mule.generate.request import Deliver, Ended, Message, Reason, Request, Token
from mule.serve.app import Api
from mule.serve.limits import Limits
from mule.serve.server import App, Server, bind

TOKEN = "a-token-of-the-tests-0123456789"
HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
MODEL = "tiny"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
TEXT = {"model": MODEL, "prompt": "Hello", "max_tokens": 3}


class ScriptedEngine:
    """Repeats the alphabet, a token each `seconds` while `gate` is open; a token is a byte."""

    context_tokens, max_rows, vocab_size = 256, 2, 256

    def __init__(self, *, chat: bool = True, seconds: float = 0.0) -> None:
        self.chat, self.seconds = chat, seconds
        self.gate = threading.Event()
        self.gate.set()
        self.requests: list[Request] = []
        self.jobs: list[ScriptedJob] = []
        self.failure = ""
        self._rows = threading.Semaphore(self.max_rows)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise ModelError("the template begins with a user", "begin with a user message")
        return [0, *b"".join(message["content"].encode() for message in messages)]

    def piece(self, token: int) -> bytes:
        return bytes([token])

    def submit(self, request: Request, deliver: Deliver) -> ScriptedJob:
        if request.schema and "impossible" in request.schema:
            raise UserError("this schema cannot be compiled", "use a simpler one")
        job = ScriptedJob(self, request, deliver)
        self.requests.append(request)
        self.jobs.append(job)
        threading.Thread(target=job.work, daemon=True).start()
        return job

    def acquire(self) -> None:
        self._rows.acquire()

    def release(self) -> None:
        self._rows.release()

    def close(self) -> None:
        for job in self.jobs:
            job.cancel()


@dataclass
class ScriptedJob:
    engine: ScriptedEngine
    request: Request
    deliver: Deliver
    cancelled: threading.Event = field(default_factory=threading.Event)
    num_tokens: int = 0
    reason: Reason | None = None

    def cancel(self) -> None:
        self.cancelled.set()

    def work(self) -> None:
        self.engine.acquire()
        reason: Reason = "length"
        for number in range(self.request.max_tokens):
            while not self.engine.gate.wait(0.01) and not self.cancelled.is_set():
                pass
            if self.cancelled.is_set() or self.engine.failure:
                reason = "cancelled" if self.cancelled.is_set() else "failed"
                break
            time.sleep(self.engine.seconds)
            token = ord("a") + number % 26
            wanted = self.request.top_logprobs
            logprobs = (
                (-0.5, tuple((98 + i, -1.0 - i) for i in range(wanted)))
                if wanted is not None
                else (None, ())
            )
            self.num_tokens += 1
            self.deliver(Token(token, chr(token), *logprobs))
        self.reason = reason
        self.engine.release()
        ids = self.request.ids
        self.deliver(Ended(reason, "", len(ids), 1, self.num_tokens, self.engine.failure))


@dataclass
class Running:
    """A server that listens, its engine, and a client of it."""

    api: Api
    engine: ScriptedEngine
    server: Server
    port: int

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        token: str | None = TOKEN,
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers, JSON or text); `body` is sent as JSON unless it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        fields = {"Authorization": f"Bearer {token}"} if token else {}
        if content is not None:
            fields["Content-Type"] = "application/json"
        connection.request(method, path, content, fields | (headers or {}))
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        kind = response.headers.get("content-type", "")
        found = json.loads(text) if kind.startswith("application/json") else text
        return response.status, {k.lower(): v for k, v in response.getheaders()}, found

    def metric(self, line: str) -> float:
        """The value of one line of /metrics, 0 where there is none."""
        for found in self.ask("GET", "/metrics")[2].splitlines():
            if found.startswith(line + " "):
                return float(found.rpartition(" ")[2])
        return 0.0

    def until(self, line: str, value: float) -> None:
        """Wait until a line of /metrics has this value."""
        deadline = time.monotonic() + 10
        while self.metric(line) != value:
            assert time.monotonic() < deadline, f"{line} is {self.metric(line)}, not {value}"
            time.sleep(0.02)


@contextmanager
def running(
    engine: ScriptedEngine | None = None, limits: Limits | None = None
) -> Iterator[Running]:
    """A server on a free port, in a thread."""
    engine = engine or ScriptedEngine()
    api = Api({MODEL: engine}, token=TOKEN, hosts=HOSTS, limits=limits or Limits())
    try:
        with listening(api) as (server, port):
            try:
                yield Running(api, engine, server, port)
            finally:
                server.should_exit = True
                engine.gate.set()
                engine.close()
    finally:
        api.close()


@contextmanager
def listening(app: App) -> Iterator[tuple[Server, int]]:
    """Any application on a free port, in a thread: (server, port)."""
    bound = bind("127.0.0.1", 0)
    listens = threading.Event()
    server = Server(app, bound, listens.set)
    thread = threading.Thread(target=server.answer)
    thread.start()
    try:
        assert listens.wait(10)
        yield server, bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
