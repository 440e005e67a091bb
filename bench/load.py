"""A server under load and attack: harness D, and the table of docs/serve.md.

    python -m bench.load run      # about six minutes; bench/results/load.json and docs/serve.md
    python -m bench.load smoke    # the same in half a minute, written nowhere
    python -m bench.load report   # docs/serve.md from what was measured

A model of random weights, nine layers of width 64, behind `mule serve` in a process of its own:

load       1, 8 and 64 clients, a minute each: chats, half of them streamed; 30% hang up in the
           middle of a stream and 5% of the requests are hostile ones of the sweep
equality   greedy answers to 48 prompts, alone and from 64 clients at once; a difference counts where
           the two best tokens are further apart than 1e-3
slowloris  200 connections that send their headers a byte at a time, while /health is asked
endurance  10,000 short requests: memory and descriptors before and after
sweep      every attempt of tests/serve_sweep.py on every route of the table
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.load_client import Client, Place, Reply, drip, send_garbage
from mule import fsio, machine
from mule.commands import docs, docs_serve

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "load.json"
MODEL, CHATS = "wild", "/v1/chat/completions"
CLIENTS = (1, 8, 64)
_HANG_UP, _HOSTILE = 0.30, 0.05
_MARGIN = 1e-3
_WORDS = "the a cat dog fish bird sat ran on mat hill near red blue old young king river saw lost"


@dataclass(frozen=True)
class Size:
    """How much is done of each part."""

    seconds: float = 60.0
    prompts: int = 48
    slow_sockets: int = 200
    slow_seconds: float = 15.0
    short_requests: int = 10_000


SMALL = Size(seconds=4.0, prompts=8, slow_sockets=50, slow_seconds=3.0, short_requests=300)


@dataclass
class Tally:
    """What the clients of one load saw."""

    completed: int = 0
    hung_up: int = 0
    hostile: int = 0
    busy: int = 0  # 429, with the time to come back
    errors: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    tokens: int = 0


def run(size: Size) -> dict[str, Any]:
    """Every part, one after the other, against one server."""
    with tempfile.TemporaryDirectory(prefix="mule-load-") as name:
        write_wild_folder(Path(name) / MODEL)
        precision = _precision(Path(name) / MODEL)
        with _server(Path(name)) as (place, process):
            found = asyncio.run(_measure(place, process, size))
    return {
        "bench": "load",
        "command": "python -m bench.load run",
        "date": time.strftime("%Y-%m-%d"),
        "precision": precision,
        **found,
        "machine": machine.describe(),
    }


def _precision(folder: Path) -> str:
    """What the server loads the folder in."""
    from mule.generate.batching import serving_dtype

    return str(serving_dtype(folder, adapted=False)).removeprefix("torch.")


def write_wild_folder(folder: Path, seed: int = 1) -> None:
    """Random weights, large enough that the best token is far ahead and differs by prompt."""
    import torch

    from mule.models.decoder import empty_decoder
    from mule.models.families import family
    from mule.models.folder import model_state, save_model
    from mule.tokenizer import Tokenizer
    from tests.tiny_folder import tiny_config
    from tests.unit.test_assume import QWEN

    draw = random.Random(seed)
    texts = [" ".join(draw.choices(_WORDS.split(), k=9)) for _ in range(200)]
    tokenizer = Tokenizer.train(texts, 320)
    raw = tiny_config(QWEN) | {"vocab_size": tokenizer.vocab_size}
    config = family(QWEN["model_type"]).from_hf(raw)
    model = empty_decoder(config, torch.float32)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    with fsio.atomic_folder(folder) as out:
        tokenizer.save(out)
        extra = {"eos_token_id": tokenizer.stop_ids[0]}
        save_model(model_state(model), config, out, extra=extra)


@contextmanager
def _server(folder: Path) -> Iterator[tuple[Place, psutil.Process]]:
    """`mule serve` on a free port; it must end with 143."""
    words = ["-m", "mule.cli.main", "serve", MODEL, "--port", "0", "--json"]
    with open(folder / "log", "wb") as log:
        child = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        if not line.startswith(b'{"url"'):
            raise SystemExit(f"the server did not start: {line!r} {(folder / 'log').read_text()}")
        started = json.loads(line)
        port = int(started["url"].rpartition(":")[2].partition("/")[0])
        token = Path(started["token_file"]).read_text().strip()
        yield Place(port, token, MODEL), psutil.Process(child.pid)
    finally:
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    if child.returncode != 143:
        raise SystemExit(f"the server ended with {child.returncode}, not 143")


async def _measure(place: Place, process: psutil.Process, size: Size) -> dict[str, Any]:
    hostile = _attempts(place)
    await _short(place, 50)  # everything has been used once
    found: dict[str, Any] = {"equality": await _equality(place, size)}
    _say("equality", found["equality"])
    found["load"] = []
    for clients in CLIENTS:
        found["load"].append(await _load(place, process, clients, size, hostile))
        _say("load", found["load"][-1])
    found["slowloris"] = await _slowloris(place, size)
    _say("slowloris", found["slowloris"])
    found["endurance"] = await _endurance(place, process, size)
    _say("endurance", found["endurance"])
    found["sweep"] = await asyncio.to_thread(_sweep, place, hostile)
    _say("sweep", found["sweep"])
    return found


def _say(name: str, result: dict[str, Any]) -> None:
    print(f"{name}: {json.dumps(result)}", flush=True)


# ---------------------------------------------------------------- load


async def _load(
    place: Place, process: psutil.Process, clients: int, size: Size, hostile: list[Any]
) -> dict[str, Any]:
    """So many clients for so long; each asks again as soon as it was answered."""
    before, tally = _held(process), Tally()
    started_at = time.perf_counter()
    ends_at = time.monotonic() + size.seconds
    await asyncio.gather(
        *(_client(place, number, ends_at, hostile, tally) for number in range(clients))
    )
    seconds = time.perf_counter() - started_at
    await asyncio.sleep(1)
    answered = tally.completed + tally.hung_up + tally.hostile + tally.busy
    return {
        "clients": clients,
        "seconds": round(seconds, 1),
        "requests": answered + len(tally.errors),
        "completed": tally.completed,
        "hung_up": tally.hung_up,
        "hostile": tally.hostile,
        "busy": tally.busy,
        "errors": len(tally.errors),
        "first_errors": tally.errors[:5],
        "requests_per_second": round(answered / seconds, 1),
        "tokens_per_second": round(tally.tokens / seconds, 1),
        "first_token_s": _quantiles(tally.first_s),
        "latency_s": _quantiles(tally.whole_s),
        "before": before,
        "after": _held(process),
    }


async def _client(
    place: Place, number: int, ends_at: float, hostile: list[Any], tally: Tally
) -> None:
    draw, client = random.Random(number), Client(place)
    while time.monotonic() < ends_at:
        try:
            if draw.random() < _HOSTILE:
                await _attack(place, draw.choice(hostile), tally)
            elif draw.random() < _HANG_UP:
                body = _chat(draw, stream=True, max_tokens=64)
                status = await client.hang_up(CHATS, body, draw.randint(2, 6))
                _count(tally, status, "hung_up")
            else:
                stream = draw.random() < 0.5
                body = _chat(draw, stream=stream, max_tokens=draw.randint(4, 32))
                reply = await client.ask(CHATS, body)
                if _count(tally, reply.status, "completed"):
                    _note(tally, reply, stream)
        except Exception as error:  # whatever it is, a client that behaves must not see it
            tally.errors.append(f"{type(error).__name__}: {error}")
            await client.close()
    await client.close()


async def _attack(place: Place, attempt: Any, tally: Tally) -> None:
    status = await send_garbage(place, attempt.raw)
    tally.hostile += 1
    if status not in attempt.want and status != 429:
        tally.errors.append(f"{attempt.label}: {status}")


def _count(tally: Tally, status: int, kind: str) -> bool:
    """Count a request of this kind; whether it was answered."""
    if status == 429:
        tally.busy += 1
    elif status == 200:
        setattr(tally, kind, getattr(tally, kind) + 1)
    else:
        tally.errors.append(f"{kind}: {status}")
    return status == 200


def _note(tally: Tally, reply: Reply, stream: bool) -> None:
    tally.whole_s.append(reply.whole_s)
    if stream:
        tally.first_s.append(reply.first_s)
        events = reply.body.split(b"\n\n")
        if events[-2] != b"data: [DONE]":
            tally.errors.append(f"a stream ended with {events[-2][:80]!r}")
        tally.tokens += len(events) - 4
    else:
        tally.tokens += reply.json()["usage"]["completion_tokens"]


def _chat(draw: random.Random, **options: Any) -> dict[str, Any]:
    text = " ".join(draw.choices(_WORDS.split(), k=draw.randint(3, 40)))
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **options}


# ---------------------------------------------------------------- equality


async def _equality(place: Place, size: Size) -> dict[str, Any]:
    """Greedy answers alone and from 64 clients at once."""
    draw = random.Random(0)
    bodies = [
        _chat(draw, temperature=0, max_tokens=24, logprobs=True, top_logprobs=2)
        for _ in range(size.prompts)
    ]
    client = Client(place)
    alone = [await client.ask(CHATS, body) for body in bodies]
    await client.close()
    clients = [Client(place) for _ in range(max(CLIENTS))]
    asked = [bodies[number % len(bodies)] for number in range(len(clients))]
    together = await asyncio.gather(*(c.ask(CHATS, b) for c, b in zip(clients, asked)))
    for one in clients:
        await one.close()
    pairs = [(alone[n % len(bodies)], reply) for n, reply in enumerate(together)]
    wrong = [pair for pair in pairs if _tokens(pair[0]) != _tokens(pair[1])]
    return {
        "prompts": len(bodies),
        "different_answers_alone": len({str(_tokens(reply)) for reply in alone}),
        "compared": len(pairs),
        "equal": len(pairs) - len(wrong),
        "different_beyond_margin": sum(_margin(*pair) > _MARGIN for pair in wrong),
    }


def _tokens(reply: Reply) -> list[str]:
    content = reply.json()["choices"][0]["logprobs"]["content"]
    return [entry["token"] for entry in content]


def _margin(alone: Reply, other: Reply) -> float:
    """How far the two best tokens were apart where the answers part."""
    content = alone.json()["choices"][0]["logprobs"]["content"]
    for entry, token in zip(content, _tokens(other)):
        if entry["token"] != token:
            best, second = entry["top_logprobs"]
            return best["logprob"] - second["logprob"]
    return float("inf")


# ---------------------------------------------------------------- slow, many, hostile


async def _slowloris(place: Place, size: Size) -> dict[str, Any]:
    """/health while many connections send nothing useful."""
    slow = [asyncio.create_task(drip(place, size.slow_seconds)) for _ in range(size.slow_sockets)]
    client, seconds = Client(place), []
    await asyncio.sleep(1)  # all of them are there
    while not seconds or not all(task.done() for task in slow):
        started_at = time.perf_counter()
        assert (await client.ask("/health")).status == 200
        seconds.append(time.perf_counter() - started_at)
        await asyncio.sleep(0.05)
    await client.close()
    return {
        "sockets": len(slow),
        "closed_by_server": sum(task.result() for task in slow),
        "health_asked": len(seconds),
        "health_ms": {
            "p50": round(1000 * statistics.median(seconds), 1),
            "max": round(1000 * max(seconds), 1),
        },
    }


async def _endurance(place: Place, process: psutil.Process, size: Size) -> dict[str, Any]:
    before = _held(process)
    started_at = time.perf_counter()
    await _short(place, size.short_requests)
    seconds = time.perf_counter() - started_at
    await asyncio.sleep(1)
    return {
        "requests": size.short_requests,
        "requests_per_second": round(size.short_requests / seconds, 1),
        "before": before,
        "after": _held(process),
    }


async def _short(place: Place, count: int, clients: int = 8) -> None:
    """Requests of one token, from eight connections."""

    async def work(number: int) -> None:
        draw, client = random.Random(number), Client(place)
        for _ in range(number, count, clients):
            reply = await client.ask(CHATS, _chat(draw, max_tokens=1))
            if reply.status != 200:
                raise SystemExit(f"a short request got {reply.status}: {reply.body!r}")
        await client.close()

    await asyncio.gather(*(work(number) for number in range(clients)))


def _attempts(place: Place) -> list[Any]:
    from mule.serve.app import Api
    from tests.serve_case import HOSTS, ScriptedEngine
    from tests.serve_sweep import Target, attempts

    table = Api({MODEL: ScriptedEngine()}, token=place.token, hosts=HOSTS)
    chat: dict[str, Any] = _chat(random.Random(0), max_tokens=1)
    text: dict[str, Any] = {"model": MODEL, "prompt": "the cat", "max_tokens": 1}
    bodies = {CHATS: chat, "/v1/completions": text}
    return list(attempts(table.routes, Target(place.port, place.token, MODEL, bodies)))


def _sweep(place: Place, hostile: list[Any]) -> dict[str, Any]:
    from tests.serve_sweep import wrong

    found = [text for attempt in hostile if (text := wrong(attempt, place.port))]
    routes = {attempt.label.partition(":")[0] for attempt in hostile}
    return {"attempts": len(hostile), "routes": len(routes), "failures": found}


def _held(process: psutil.Process) -> dict[str, float]:
    """Resident megabytes and open descriptors of the server."""
    return {
        "rss_mb": round(process.memory_info().rss / 1e6, 1),
        "descriptors": process.num_fds(),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 4), "p99": round(cuts[98], 4)}


def main(verb: str) -> None:
    if verb == "run":
        fsio.write_json(RESULTS, run(Size()))
    elif verb == "smoke":
        run(SMALL)
        return
    page = docs_serve.PAGE
    fsio.write_text(docs.settings.DOCS / page, docs.generated_pages()[page])


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "run")
