"""The answers' form, whole and streamed; rows, the queue, and those who leave."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mule.serve.limits import Limits
from mule.serve.server import Server, bind
from tests.serve_case import CHAT, MODEL, TEXT, TOKEN, Running, ScriptedEngine, running

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as server:
        yield server


def _events(served: Running, path: str, body: dict[str, Any]) -> list[Any]:
    status, headers, text = served.ask("POST", path, body | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    lines = text.split("\n\n")
    assert lines[-1] == "" and all(line.startswith("data: ") for line in lines[:-1])
    data = [line.removeprefix("data: ") for line in lines[:-1]]
    return [line if line == "[DONE]" else json.loads(line) for line in data]


def test_a_chat(served: Running) -> None:
    body = served.ask("POST", CHATS, CHAT)[2]
    assert body["object"] == "chat.completion" and body["model"] == MODEL
    assert body["id"].startswith("chatcmpl-") and abs(body["created"] - time.time()) < 60
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "abc", "refusal": None}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 3,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_a_chat_streamed(served: Running) -> None:
    *chunks, done = _events(served, CHATS, CHAT | {"stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    used = chunks.pop()
    assert used["choices"] == [] and used["usage"]["total_tokens"] == 9
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta.get("content") for delta in deltas[1:]] == ["a", "b", "c", None]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["length"]
    assert "usage" not in _events(served, CHATS, CHAT)[0]


def test_logprobs_of_a_chat(served: Running) -> None:
    asked = CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    listed = served.ask("POST", CHATS, asked)[2]["choices"][0]["logprobs"]["content"]
    assert listed == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [
                {"token": "b", "logprob": -1.0, "bytes": [98]},
                {"token": "c", "logprob": -2.0, "bytes": [99]},
            ],
        }
    ]
    streamed = _events(served, CHATS, asked)[1]["choices"][0]["logprobs"]["content"]
    assert streamed == listed


def test_completions(served: Running) -> None:
    body = served.ask("POST", TEXTS, TEXT | {"prompt": ["ab", [1, 2, 3]], "n": 2, "logprobs": 1})[2]
    assert body["object"] == "text_completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["abc"] * 4
    assert body["usage"]["prompt_tokens"] == 5 and body["usage"]["completion_tokens"] == 12
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"b": -1.0}] * 3,
        "text_offset": [0, 1, 2],
    }


def test_completions_streamed(served: Running) -> None:
    *chunks, _ = _events(served, TEXTS, TEXT | {"n": 2, "logprobs": 0})
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "abc"
        assert [choice["finish_reason"] for choice in mine] == [None, None, None, "length"]
        assert [c["logprobs"]["text_offset"] for c in mine[:3]] == [[0], [1], [2]]


def test_models(served: Running) -> None:
    listed = served.ask("GET", "/v1/models")[2]
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert listed["data"][0]["context_length"] == 256
    assert served.ask("GET", f"/v1/models/{MODEL}")[2] == listed["data"][0]
    status, _, body = served.ask("GET", "/v1/models/other")
    assert (status, body["error"]["code"]) == (404, "model_not_found")


def test_health_tells_nothing_to_strangers(served: Running) -> None:
    assert served.ask("GET", "/health", token=None)[2] == {"status": "ok"}


def test_metrics() -> None:
    with running() as server:
        server.ask("POST", CHATS, CHAT)
        server.ask("GET", "/nothing/here")
        for line, value in (
            (f'mule_requests_total{{code="200",route="{CHATS}"}}', 1),
            ('mule_requests_total{code="404",route="(none)"}', 1),
            ('mule_prompt_tokens_total{model="tiny"}', 6),
            ('mule_prompt_tokens_cached_total{model="tiny"}', 1),
            ('mule_generated_tokens_total{model="tiny"}', 3),
            ('mule_answers_total{model="tiny",reason="length"}', 1),
            ('mule_first_token_seconds_count{model="tiny"}', 1),
            ('mule_token_seconds_count{model="tiny"}', 2),
            ('mule_busy_rows{model="tiny"}', 0),
            ('mule_waiting_answers{model="tiny"}', 0),
        ):
            assert server.metric(line) == value, line


def test_an_engine_that_fails() -> None:
    engine = ScriptedEngine()
    with running(engine) as server:
        engine.failure = "out of memory"
        status, _, body = server.ask("POST", CHATS, CHAT)
        assert status == 500 and body["error"]["message"] == "the model failed: out of memory"
        *_, last = _events(server, CHATS, CHAT)
        assert last["error"]["code"] == "engine_failed"
        assert server.metric('mule_answers_total{model="tiny",reason="failed"}') == 2


# ---------------------------------------------------------------- rows, queue, and those who leave


def _begin(server: Running, body: dict[str, Any]) -> http.client.HTTPConnection:
    """A request whose answer is not read."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connection.request("POST", TEXTS, json.dumps(body), headers)
    return connection


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_who_hangs_up_frees_the_row(stream: bool) -> None:
    engine = ScriptedEngine(seconds=0.01)
    with running(engine) as server:
        connection = _begin(server, TEXT | {"max_tokens": 240, "stream": stream})
        if stream:
            assert connection.getresponse().read(10)
        server.until('mule_busy_rows{model="tiny"}', 1)
        connection.close()
        server.until('mule_busy_rows{model="tiny"}', 0)
        assert engine.jobs[0].reason == "cancelled" and engine.jobs[0].num_tokens < 240
        server.until(f'mule_requests_cut_total{{route="{TEXTS}"}}', 1)


def test_a_full_queue() -> None:
    """Two rows and one that waits; the fourth is told when to come back."""
    engine = ScriptedEngine()
    with running(engine, Limits(queue=1)) as server:
        engine.gate.clear()
        begun = [_begin(server, TEXT) for _ in range(3)]
        server.until('mule_waiting_answers{model="tiny"}', 1)
        assert server.metric('mule_busy_rows{model="tiny"}') == 2
        status, headers, body = server.ask("POST", TEXTS, TEXT)
        assert status == 429 and 1 <= int(headers["retry-after"]) <= 60
        assert "2 answers are being written and 1 wait" in body["error"]["message"]
        assert body["error"]["type"] == "rate_limit_error"
        engine.gate.set()
        assert [connection.getresponse().status for connection in begun] == [200] * 3
        assert server.ask("POST", TEXTS, TEXT)[0] == 200
        for connection in begun:
            connection.close()


def test_who_waits_may_leave_too() -> None:
    engine = ScriptedEngine()
    with running(engine) as server:
        engine.gate.clear()
        begun = [_begin(server, TEXT) for _ in range(4)]
        server.until('mule_waiting_answers{model="tiny"}', 2)
        for connection in begun:
            connection.close()
        server.until('mule_waiting_answers{model="tiny"}', 0)
        server.until('mule_busy_rows{model="tiny"}', 0)


def test_the_end_of_a_server() -> None:
    """Answers under way get some seconds, then they are told; new ones are refused."""
    engine = ScriptedEngine(seconds=0.02)
    with running(engine, Limits(closing_seconds=0.5)) as server:
        short = _begin(server, TEXT | {"max_tokens": 5, "stream": True})
        long = _begin(server, TEXT | {"max_tokens": 240, "stream": True})
        found: list[Any] = []
        whole = threading.Thread(
            target=lambda: found.append(server.ask("POST", TEXTS, TEXT | {"max_tokens": 240}))
        )
        responses = [short.getresponse(), long.getresponse()]
        whole.start()
        server.until('mule_busy_rows{model="tiny"}', 2)
        started_at = time.monotonic()
        server.server.should_exit = True
        texts = [response.read().decode() for response in responses]
        whole.join(10)
        for connection in (short, long):
            connection.close()
        assert time.monotonic() - started_at < 4
    assert texts[0].endswith("data: [DONE]\n\n")
    last = json.loads(texts[1].strip().split("\n\n")[-1].removeprefix("data: "))
    assert "the server is closing" in last["error"]["message"]
    assert found[0][0] == 503 and found[0][2]["error"]["code"] == "closing"


def test_who_comes_while_it_closes(served: Running) -> None:
    served.api.guard.closing = True
    try:
        status, headers, body = served.ask("POST", TEXTS, TEXT)
        assert (status, headers["retry-after"]) == (503, "10")
        assert "closing" in body["error"]["message"]
        assert served.ask("GET", "/health")[0] == 503
    finally:
        served.api.guard.closing = False


def test_a_second_signal_does_not_wait(served: Running) -> None:
    server = Server(served.api, bind("127.0.0.1", 0))
    server.handle_exit(15, None)
    assert server.should_exit and not server.force_exit
    server.handle_exit(2, None)
    assert server.force_exit and server.signum == 15
    server._bound.close()
