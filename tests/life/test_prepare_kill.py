"""A preparation that is killed goes on to the very same bytes. Real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mule.tokenizer import Tokenizer
from tests.life.preparer import Preparer

KINDS = ("text", "chat", "held out")
SMALL = {"batch_chars": 2000, "sync_chars": 1}  # a line in the log every few rows
NUM_ROWS = 300


@pytest.fixture(scope="module")
def preparer() -> Iterator[Preparer]:
    server = Preparer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, text.jsonl and chat.jsonl."""
    folder = tmp_path_factory.mktemp("source")
    texts = [f"Row {n} speaks of Paris{' and of Spain' * (n % 17)}.\n" for n in range(NUM_ROWS)]
    Tokenizer.train(texts, 400).save(folder / "tokenizer")
    chats = [
        [{"role": "user", "content": "And?"}, {"role": "assistant", "content": text[:200]}]
        for text in texts
    ]
    _write_rows(folder / "text.jsonl", [{"text": text} for text in texts])
    _write_rows(folder / "chat.jsonl", [{"messages": chat} for chat in chats])
    return folder


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _job(source: Path, folder: Path, kind: str) -> dict[str, Any]:
    name = "chat.jsonl" if kind == "chat" else "text.jsonl"
    return {
        **SMALL,
        "folder": str(folder),
        "file": str(source / name),
        "tokenizer": str(source / "tokenizer"),
        "hold_out": kind == "held out",
        "max_seq_length": 200,
    }


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def _finish(preparer: Preparer, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    code = preparer.wait(preparer.start(**job))
    assert code == 0, (folder / "output.log").read_text()
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(
    preparer: Preparer, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Of each kind: every byte, how long it took, and its durable calls."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("undisturbed")
        started_at = time.perf_counter()
        result = _finish(preparer, folder, _job(source, folder, kind))
        seconds = time.perf_counter() - started_at
        files = _contents(folder / "p")
        assert len({name.split("/")[0] for name in files}) == 1 + (kind == "held out")
        found[kind] = {"files": files, "seconds": seconds, "calls": result["calls"]}
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_at_random_moments(
    preparer: Preparer,
    source: Path,
    undisturbed: dict[str, dict[str, Any]],
    tmp_path: Path,
    kind: str,
    seed: int,
) -> None:
    chance = random.Random(f"{kind} {seed}")
    job = _job(source, tmp_path, kind)
    for _ in range(4):
        pid = preparer.start(**job)
        time.sleep(chance.uniform(0.1, 0.9) * undisturbed[kind]["seconds"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert preparer.wait(pid) in (0, -signal.SIGKILL), (tmp_path / "output.log").read_text()
    _finish(preparer, tmp_path, job)
    assert _contents(tmp_path / "p") == undisturbed[kind]["files"]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "text")) for kind in KINDS]
)
def test_killed_before_a_durable_call(
    preparer: Preparer,
    source: Path,
    undisturbed: dict[str, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
) -> None:
    """At some of them all along, and at every one between the last log line and the end."""
    calls = undisturbed[kind]["calls"]
    chance = random.Random(kind)
    for die_at in sorted({*chance.sample(range(calls), 8), *range(calls - 24, calls)}):
        folder = tmp_path_factory.mktemp("killed")
        job = _job(source, folder, kind)
        assert preparer.wait(preparer.start(**job, die_at=die_at)) == -signal.SIGKILL
        _finish(preparer, folder, job)
        assert _contents(folder / "p") == undisturbed[kind]["files"], f"killed at {die_at}"


def test_it_says_that_it_goes_on(
    preparer: Preparer, source: Path, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    job = _job(source, tmp_path, "text")
    die_at = undisturbed["text"]["calls"] // 2
    assert preparer.wait(preparer.start(**job, die_at=die_at)) == -signal.SIGKILL
    assert not (tmp_path / "notes").exists()
    _finish(preparer, tmp_path, job)
    (note,) = (tmp_path / "notes").read_text().splitlines()
    start, _, rest = note.partition(", after ")
    assert start == "going on where an earlier preparation stopped"
    assert 0 < int(rest.split()[0]) < NUM_ROWS


@pytest.mark.parametrize("first_dies", [False, True])
def test_a_second_process_waits_for_the_first(
    preparer: Preparer,
    source: Path,
    undisturbed: dict[str, dict[str, Any]],
    tmp_path: Path,
    first_dies: bool,
) -> None:
    job = _job(source, tmp_path, "text")
    first = preparer.start(**job, notes="notes-1")
    _until(lambda: list((tmp_path / "p").glob(".partial-*/progress.jsonl")))
    os.kill(first, signal.SIGSTOP)
    second = preparer.start(**job, notes="notes-2")
    _until((tmp_path / "notes-2").exists)
    os.kill(first, signal.SIGKILL if first_dies else signal.SIGCONT)
    assert preparer.wait(first) == (-signal.SIGKILL if first_dies else 0)
    assert preparer.wait(second) == 0, (tmp_path / "output.log").read_text()
    notes = (tmp_path / "notes-2").read_text().splitlines()
    assert notes[0] == "another process prepares the same data: waiting for it to end"
    assert len(notes) == 1 or (first_dies and notes[1].startswith("going on where an earlier"))
    assert _contents(tmp_path / "p") == undisturbed["text"]["files"]


def _until(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---------------------------------------------------------------- five gigabytes


def _generate(file: Path, num_bytes: int) -> None:
    """Rows of about 2,000 characters, each with a number of its own."""
    chance = random.Random(7)
    letters = "etaoinshrdlu"
    words = ["".join(chance.choices(letters, k=chance.randint(1, 9))) for _ in range(5000)]
    bodies = [" ".join(chance.choices(words, k=350)) for _ in range(500)]
    written = number = 0
    with open(file, "w", buffering=1 << 22) as opened:
        while written < num_bytes:
            for body in bodies:
                number += 1
                written += opened.write(f'{{"text": "{number} {body} {number * 7919}"}}\n')


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("num_bytes", [200_000_000, 5_000_000_000], ids=["200MB", "5GB"])
def test_a_large_file_in_bounded_memory(preparer: Preparer, tmp_path: Path, num_bytes: int) -> None:
    """Under 1.5 GB of resident memory, also after a kill in the middle."""
    file = tmp_path / "large.jsonl"
    _generate(file, num_bytes)
    with open(file) as opened:
        texts = [json.loads(next(opened))["text"] for _ in range(200)]
    Tokenizer.train(texts, 4000).save(tmp_path / "tokenizer")
    job = {
        "folder": str(tmp_path),
        "file": str(file),
        "tokenizer": str(tmp_path / "tokenizer"),
        "max_seq_length": 1024,
        "sync_chars": min(64_000_000, num_bytes // 10),
    }
    pid = preparer.start(**job)
    _until_noted(tmp_path / "p", num_bytes // 2)
    os.kill(pid, signal.SIGKILL)
    assert preparer.wait(pid) == -signal.SIGKILL
    result = _finish(preparer, tmp_path, job)
    assert "going on where an earlier preparation stopped" in (tmp_path / "notes").read_text()
    assert result["peak_bytes"] < 1_500_000_000
    (index,) = (tmp_path / "p").glob("train-*/index.json")
    counts = json.loads(index.read_text())
    with open(file, "rb") as opened:
        assert counts["num_items"] == counts["num_examples"] == sum(1 for _ in opened)


def _until_noted(folder: Path, num_bytes: int) -> None:
    """Wait until the log says that so much of the source is done."""
    while True:
        for log in folder.glob(".partial-*/progress.jsonl"):
            lines = log.read_text().splitlines()
            if len(lines) > 1 and json.loads(lines[-2])["bytes"] >= num_bytes:
                return
        time.sleep(0.05)
