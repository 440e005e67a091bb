"""Harness D sees what it is there to see; docs/serve.md says what it found."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import load
from bench.load import Size, Tally
from bench.load_client import Client, Place, Reply, drip, send_garbage
from mule import fsio
from mule.commands import docs_serve
from mule.serve.limits import Limits
from tests.serve_case import MODEL, TOKEN, Running, ScriptedEngine, running
from tests.serve_sweep import Attempt


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MODEL", MODEL)


def _place(server: Running) -> Place:
    return Place(server.port, TOKEN, MODEL)


def _engine() -> ScriptedEngine:
    engine = ScriptedEngine()
    engine.context_tokens = 2_048
    return engine


def test_the_parts_against_a_server() -> None:
    size = Size(seconds=0.5, prompts=3, slow_sockets=3, slow_seconds=2.0, short_requests=20)
    refused = Attempt("a: b", b"GET /x HTTP/1.1\r\nhost: evil\r\n\r\n", frozenset({403}))
    with running(_engine(), Limits(head_seconds=0.3)) as server:
        place, process = _place(server), psutil.Process()
        found = asyncio.run(load._load(place, process, 2, size, [refused]))
        assert found["errors"] == 0, found["first_errors"]
        assert found["completed"] > 3 and found["requests_per_second"] > 1
        assert 0 < found["first_token_s"]["p50"] <= found["first_token_s"]["p99"]
        equal = asyncio.run(load._equality(place, size))
        assert (equal["compared"], equal["equal"], equal["prompts"]) == (64, 64, 3)
        slow = asyncio.run(load._slowloris(place, size))
        assert (slow["sockets"], slow["closed_by_server"]) == (3, 3)
        long = asyncio.run(load._endurance(place, process, size))
        assert long["requests"] == 20 and long["after"]["rss_mb"] > 0
        held = load._sweep(place, [refused, Attempt("a: c", refused.raw, frozenset({200}))])
    assert (held["attempts"], held["routes"], len(held["failures"])) == (2, 1, 1)


def test_a_client_that_misbehaves() -> None:
    async def work(place: Place) -> None:
        client = Client(place)
        body = {"model": MODEL, "prompt": "a", "max_tokens": 200, "stream": True}
        assert await client.hang_up("/v1/completions", body, 2) == 200
        assert (await client.ask("/health")).status == 200
        assert (await client.ask("/nothing")).status == 404
        await client.close()
        assert await send_garbage(place, b"\x00\r\n\r\n") == 400
        assert await drip(place, 0.2) is False

    with running(ScriptedEngine(seconds=0.005)) as server:
        asyncio.run(work(_place(server)))
        server.until('mule_busy_rows{model="tiny"}', 0)


def test_what_counts_as_an_error() -> None:
    tally = Tally()
    assert load._count(tally, 200, "completed") and not load._count(tally, 429, "hung_up")
    assert not load._count(tally, 500, "completed")
    assert (tally.completed, tally.busy, tally.errors) == (1, 1, ["completed: 500"])
    load._note(tally, Reply(200, b"data: {}\n\ndata: cut"), True)
    assert tally.errors[1].startswith("a stream ended with")


def test_differences_count_beyond_the_margin() -> None:
    def reply(*tokens: str) -> Reply:
        tops = [{"logprob": -0.5}, {"logprob": -0.7}]
        content = [{"token": token, "top_logprobs": tops} for token in tokens]
        return Reply(200, json.dumps({"choices": [{"logprobs": {"content": content}}]}).encode())

    assert load._margin(reply("a", "b"), reply("a", "c")) == pytest.approx(0.2)
    assert load._margin(reply("a"), reply("a")) == float("inf")


def _found() -> dict[str, Any]:
    held = {
        "before": {"rss_mb": 100.0, "descriptors": 7},
        "after": {"rss_mb": 101.5, "descriptors": 7},
    }
    return {
        "load": [
            {
                "clients": 64, "requests": 1234, "hung_up": 300, "hostile": 60, "busy": 5, "errors": 0,
                "requests_per_second": 20.4, "tokens_per_second": 456.7,
                "first_token_s": {"p50": 0.05, "p99": 1.5}, "latency_s": {}, **held,
            }
        ],
        "precision": "fp32",
        "equality": {
            "compared": 64, "equal": 63, "different_answers_alone": 9, "different_beyond_margin": 0
        },
        "slowloris": {
            "sockets": 200, "closed_by_server": 199, "health_asked": 300,
            "health_ms": {"p50": 2.5, "max": 40.0},
        },
        "endurance": {"requests": 10_000, "requests_per_second": 99.5, **held},
        "sweep": {"attempts": 480, "routes": 6, "failures": ["one"]},
        "machine": {"cpu": "a processor", "cores": 2},
        "date": "2026-01-02",
        "command": "python -m bench.load run",
    }  # fmt: skip


def test_the_page(tmp_path: Path) -> None:
    assert "Not measured yet" in docs_serve.load_markdown(tmp_path)
    fsio.write_json(tmp_path / "load.json", _found())
    text = docs_serve.load_markdown(tmp_path)
    row = "| 64 | 1,234 | 300 | 60 | 5 | **0** | 20 | 457 | 50 ms / 1.50 s | - | 100 → 101.5 MB"
    assert row in text
    assert (
        "of 64 greedy answers given to 64 clients at once 63 are those given alone (9 dif" in text
    )
    assert "200 connections, of which the server closed 199; `/health` meanwhile 2.5 ms, at" in text
    assert "10,000 requests of one token at 100 a second; memory 100 → 101.5 MB" in text
    assert "480 hostile requests on 6 routes, 479 answered as they must be" in text
    assert "a processor, 2 cores, server and clients together; 2026-01-02" in text
