"""Nobody reaches a route who may not; nothing large, slow or ambiguous gets far."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.routing import Mount, Route

from mule.errors import UserError
from mule.serve.guard import check_routes
from mule.serve.json_body import parse_body
from mule.serve.limits import Limits
from mule.serve.problem import Problem
from mule.serve.redaction import SafeFormatter, safe_line
from tests.serve_case import CHAT, MODEL, TEXT, TOKEN, Running, ScriptedEngine, running
from tests.serve_sweep import Target, attempts, send, wrong

BODIES: dict[str, dict[str, Any]] = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
SHORT = Limits(head_seconds=0.5, body_seconds=0.3, read_seconds=0.3, connections=20)


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    with running(limits=SHORT) as server:
        yield server


def test_the_sweep(served: Running) -> None:
    """Every attempt on every route of the table is answered as it must be."""
    target = Target(served.port, TOKEN, MODEL, BODIES)
    tried = list(attempts(served.api.routes, target))
    assert len(tried) >= 150
    found = [text for attempt in tried if (text := wrong(attempt, served.port))]
    assert not found, "\n".join(found)
    swept = {attempt.label.partition(":")[0] for attempt in tried}
    assert swept == {route.path for route in served.api.routes}


def test_the_sweep_sees_a_hole() -> None:
    """An attempt that wants another answer than it gets is reported."""
    with running() as server:
        target = Target(server.port, "another-token", MODEL, BODIES)
        first = next(attempts(server.api.routes[2:], target))
        assert wrong(first, server.port).startswith("/v1/models: as it should be: 401, not [200]")


def test_every_route_of_the_table_is_guarded(served: Running) -> None:
    assert served.api.guard._routes == served.api.routes
    with pytest.raises(UserError, match="no plain route"):
        check_routes([Mount("/files", routes=[])])
    with pytest.raises(UserError, match="no plain route"):
        check_routes([Route("/x", type("Any", (), {}))])


def test_what_is_told_to_those_refused(served: Running) -> None:
    for headers, code, words in (
        ({"Host": "evil.example"}, "host_not_allowed", 'Host is "evil.example"; this server'),
        ({"Origin": "null"}, "origin_not_allowed", 'Origin is "null"; pages of other places'),
        ({"Authorization": "Bearer x"}, "invalid_api_key", "the token is not the one of this"),
        ({"Content-Type": "text/plain"}, "content_type", "Content-Type: application/json"),
        ({"X-HTTP-Method-Override": "PUT"}, "method_override", "is not taken"),
    ):
        _, found, body = served.ask("POST", "/v1/completions", TEXT, headers)
        assert body["error"]["code"] == code and words in body["error"]["message"]
        assert found["content-type"] == "application/json"
    assert (
        served.ask("POST", "/v1/completions", TEXT, token=None)[1]["www-authenticate"] == "Bearer"
    )
    status, headers, body = served.ask("DELETE", "/v1/models")
    assert (status, headers["allow"]) == (405, "GET, HEAD")
    assert "use GET, HEAD" in body["error"]["message"]
    assert "there are /health, /metrics" in served.ask("GET", "/x")[2]["error"]["message"]


# ---------------------------------------------------------------- bodies and connections


def _post(length: str, body: bytes) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", f"authorization: Bearer {TOKEN}"]
    return "\r\n".join([*lines, "content-type: application/json", length, "", ""]).encode() + body


def test_a_body_that_does_not_come(impatient: Running) -> None:
    status, headers, body = send(impatient.port, _post("content-length: 100", b"{"))
    assert (status, headers["connection"]) == (408, "close")
    assert b"not there after 0.3 seconds" in body


def test_a_body_without_end(served: Running) -> None:
    """Counted as it comes: it is refused at the limit, long before it ends."""
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    status, _, body = send(served.port, _post("transfer-encoding: chunked", chunk * 9))
    assert status == 413 and b"more than 8,000,000 bytes" in body


def test_a_body_of_the_limit_is_read(served: Running) -> None:
    body = json.dumps(TEXT).encode().ljust(8_000_000)
    assert served.ask("POST", "/v1/completions", body)[0] == 200
    status, _, refused = served.ask("POST", "/v1/completions", body + b" ")
    assert status == 413 and refused["error"]["code"] == "body_too_large"


def test_a_length_that_is_too_short(served: Running) -> None:
    """What follows is no request of its own."""
    status, _, rest = send(served.port, _post("content-length: 2", b"{}" + b"x" * 50))
    assert status == 400 and b"200 OK" not in rest


def _sockets(port: int, count: int, say: bytes) -> list[socket.socket]:
    opened = []
    for _ in range(count):
        opened.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        opened[-1].sendall(say)
    return opened


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def test_slow_headers_and_idle_connections_are_dropped(impatient: Running) -> None:
    started_at = time.monotonic()
    with ExitStack() as stack:
        slow = _sockets(impatient.port, 5, b"GET /health HTTP/1.1\r\nx: ")
        slow += _sockets(impatient.port, 5, b"")
        for connection in slow:
            stack.enter_context(connection)
        for _ in range(4):  # a byte now and then keeps none of them
            time.sleep(0.1)
            for connection in slow[:5]:
                connection.sendall(b"a")
        assert all(_is_closed(connection) for connection in slow)
    assert time.monotonic() - started_at < 3
    assert impatient.ask("GET", "/health")[0] == 200


def test_who_idles_makes_room(impatient: Running) -> None:
    """A thousand connections that ask nothing keep nobody out."""
    with ExitStack() as stack:
        opened = [stack.enter_context(s) for s in _sockets(impatient.port, 60, b"")]
        assert impatient.ask("GET", "/health")[0] == 200
        assert all(map(_is_closed, opened[:40]))


def test_more_at_work_than_there_may_be_connections() -> None:
    engine = ScriptedEngine()
    with running(engine, Limits(connections=3)) as server, ExitStack() as stack:
        engine.gate.clear()
        body = json.dumps(TEXT).encode()
        say = _post(f"content-length: {len(body)}", body)
        busy = [stack.enter_context(each) for each in _sockets(server.port, 3, say)]
        while len(engine.requests) < 3:
            time.sleep(0.01)
        with _sockets(server.port, 1, b"")[0] as late:
            answer = late.recv(5000)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"too many connections" in answer
        engine.gate.set()
        assert all(each.recv(100).startswith(b"HTTP/1.1 200 ") for each in busy)


def test_a_reader_that_stops_is_dropped() -> None:
    """Its memory is bounded, and its row is free again."""
    engine = ScriptedEngine()
    engine.context_tokens = 10_000
    with running(engine, SHORT) as server:  # events of about 700 bytes, more than buffers hold
        asked = {**TEXT, "max_tokens": 9_000, "stream": True, "logprobs": 20}
        body = json.dumps(asked).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(_post(f"content-length: {len(body)}", body))
            server.until('mule_requests_cut_total{route="/v1/completions"}', 1)
        server.until('mule_busy_rows{model="tiny"}', 0)


def test_an_answer_takes_no_longer_than_it_may() -> None:
    engine = ScriptedEngine()
    with running(engine, Limits(request_seconds=0.3)) as server:
        engine.gate.clear()
        status, _, body = server.ask("POST", "/v1/completions", TEXT)
        assert status == 504 and "no answer after 0.3 seconds" in body["error"]["message"]
        engine.gate.set()
        server.until('mule_busy_rows{model="tiny"}', 0)


class _Broken(ScriptedEngine):
    def encode(self, text: str) -> list[int]:
        raise ZeroDivisionError("an inside")


def test_a_defect_is_told_without_its_insides(caplog: pytest.LogCaptureFixture) -> None:
    with running(_Broken()) as server:
        status, _, body = server.ask("POST", "/v1/completions", TEXT)
        assert server.ask("GET", "/health")[0] == 200
    assert status == 500 and body["error"]["code"] == "defect"
    assert "this is a defect of Mule" in body["error"]["message"]
    lines = [SafeFormatter(frozenset()).format(record) for record in caplog.records]
    assert any("/v1/completions failed: ZeroDivisionError: an inside at test_" in x for x in lines)


def test_websockets_and_strange_protocols() -> None:
    """The guard itself refuses what uvicorn would not hand over."""
    sent: list[Any] = []

    async def collect(message: Any) -> None:
        sent.append(message)

    async def nothing() -> Any:
        raise AssertionError

    with running() as server:
        asyncio.run(server.api.guard({"type": "websocket"}, nothing, collect))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# ---------------------------------------------------------------- JSON and log lines


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "Expecting value"),
        (b"[1]", "it is a list, not an object"),
        (b'{"a": 1, "a": 2}', 'the key "a" stands there twice'),
        (b'{"a": Infinity}', "Infinity is not JSON"),
        (b'{"a": "\\ud800"}', r"\ud800 is half of a character"),
        (b'{"\\udc00": [1]}', r"\udc00 is half of a character"),
        (b'{"a": "\xc3("}', "byte 7 is not UTF-8"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64 levels"),
        (b"[" * 10**6, "more than 200,000 values"),
        (b'{"a": [' + b"1," * 300_000 + b"1]}", "more than 200,000 values"),
        (b'{"a": "' + b"\\" * 4_000_001, "Unterminated string"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "Exceeds the limit"),
    ],
    ids=range(12),
)
def test_bodies_that_are_refused(body: bytes, words: str) -> None:
    started_at = time.perf_counter()
    with pytest.raises(Problem) as caught:
        parse_body(body, Limits())
    assert words in caught.value.message and len(caught.value.message) < 400
    assert time.perf_counter() - started_at < 2


def test_strings_do_not_count_as_structure() -> None:
    text = '[{"' * 100_000 + '\\ "quoted" \n,,,,'
    assert parse_body(json.dumps({"a": text}).encode(), Limits()) == {"a": text}


def test_keys_without_number_are_compared_quickly() -> None:
    keys = ",".join(f'"k{i}": 1' for i in range(100_000))
    started_at = time.perf_counter()
    with pytest.raises(Problem, match='"k99999" stands there twice'):
        parse_body(f'{{{keys}, "k99999": 2}}'.encode(), Limits())
    assert time.perf_counter() - started_at < 2


def test_a_log_line_stays_one_line() -> None:
    forged = "GET /\r\n12:00:00 GET /admin 200\x1b[31m\u2028\u202e"
    assert safe_line(forged) == r"GET /\x0d\x0a12:00:00 GET /admin 200\x1b[31m\x2028\x202e"
    assert len(safe_line("a" * 10_000)) < 2_100


def test_no_secret_in_a_log_line() -> None:
    line = safe_line(
        f"Authorization: Bearer abc.def hf_abcdefgh sk-proj-123456 {TOKEN}", frozenset({TOKEN})
    )
    assert line == "Authorization: Bearer [secret] hf_[secret] sk-[secret] [secret]"


def test_an_exception_is_logged_on_one_line() -> None:
    try:
        raise ValueError("first\nsecond hf_abcdefgh")
    except ValueError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "", 0, "it failed", (), (ValueError, error, None)
        )
    text = SafeFormatter(frozenset()).format(record)
    assert r"it failed: ValueError: first\x0asecond hf_[secret] at test_serve_guard.py:" in text


def test_requests_are_logged_without_their_secrets(
    served: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Bad inputs 109 and 110: neither the query nor the token, and no line of the client's."""
    caplog.set_level(logging.INFO, logger="mule.serve")
    served.ask("GET", f"/v1/models?token={TOKEN}")
    served.ask("GET", "/forged%0d%0a12:00%20GET%20/admin%20200")
    served.ask("POST", "/v1/completions", {**TEXT, "prompt": "my sk-secret-prompt"})
    lines = [SafeFormatter(frozenset({TOKEN})).format(record) for record in caplog.records]
    assert any("GET /v1/models 400" in line for line in lines)
    assert any(r"GET /forged\x0d\x0a12:00 GET /admin 200 404" in line for line in lines)
    assert not any(TOKEN in line or "sk-" in line or "\n" in line for line in lines)


def test_many_at_once_get_their_own_answers(served: Running) -> None:
    found: list[int] = []

    def ask() -> None:
        for _ in range(5):
            found.append(served.ask("POST", "/v1/chat/completions", CHAT)[0])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 40
