"""The long run of bench/linear.py: a small model trained by `mule train`, watched from outside."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mule.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
EVERY = 100  # updates between two samples of the long run
SETTLED = 0.1  # of the samples come before the line: the first ones compile and fill caches
SPAN = 10_000  # updates, over which a change of speed is given
RATE_BOUND = 0.02  # of the mean speed in a span: what other work on a machine does to it
BYTES_BOUND = 1024  # an update: 10 MiB in a span
NOISE = 5  # bounds; half an interval that is wider could hide what matters
LONG = (
    *("model.size=1m", "tokenizer.vocab_size=1024", "data.train=[text.txt]", "data.format=text"),
    *("data.max_seq_length=128", "train.step_rows=8"),
    *("evaluate.every_steps=1000", "checkpoint.every_steps=2500"),
)
TEXT_WORDS = 400_000


def long_run(
    steps: int, given: tuple[str, ...], every: int = EVERY, text_words: int = TEXT_WORDS
) -> dict[str, Any]:
    """`mule train` for many updates: its samples, and the slopes of rate and memory."""
    with tempfile.TemporaryDirectory(prefix="mule-linear-") as name:
        folder = Path(name)
        (folder / "text.txt").write_text(made_up_text(text_words), encoding="utf-8")
        words = settings(LONG, (*given, f"train.steps={steps}"))
        command = [sys.executable, "-m", "mule.cli.main", "train", *words, "--name", "long"]
        with (folder / "output.log").open("w") as log:
            child = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment()
            )
            try:
                samples = watch(child, folder / "runs" / "long" / "metrics.jsonl", steps, every)
            finally:
                child.kill()
                child.wait()
        if not samples or samples[-1]["step"] <= steps - 2 * every:
            text = (folder / "output.log").read_text().strip()
            raise UserError(f"the long run ended early: {text[-500:]}", "see what it says")
    found = {"steps": steps, "words": words, "every": every, **slopes(samples)}
    return {**found, "samples": samples}


def watch(
    child: subprocess.Popen[bytes], log: Path, steps: int, every: int
) -> list[dict[str, float]]:
    """A sample at every so many updates, until the process has ended.

    An update that was refused has no row: then the next one's is taken.
    """
    samples: list[dict[str, float]] = []
    before: dict[str, Any] | None = None
    place, held, running = 0, 0, True
    while running:
        running = child.poll() is None
        time.sleep(0.05)
        held = memory_bytes(child.pid) or held  # the last known when it has ended
        rows, place = new_rows(log, place)
        for row in rows:
            if before is None or row["step"] // every > before["step"] // every:
                if before is not None and before["step"] >= every:
                    samples.append(sample(row, before, held))
                    tell(samples[-1], steps)
                before = row
    return samples


def sample(row: dict[str, Any], before: dict[str, Any], held: int) -> dict[str, float]:
    """The rate since the row before, by the clock, and the memory now."""
    updates, took = row["step"] - before["step"], row["at"] - before["at"]
    return {
        "step": row["step"],
        "tokens_per_second": updates * row["num_targets"] / took,
        "rss_bytes": held,
        "loss": row["loss"],
    }


def new_rows(log: Path, place: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a log after `place`, and the place behind them."""
    if not log.is_file():
        return [], place
    with log.open("rb") as file:
        file.seek(place)
        whole, newline, _ = file.read().rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()], place + len(whole) + len(newline)


def memory_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def slopes(samples: list[dict[str, float]]) -> dict[str, Any]:
    """What the samples come to once settled: means, slopes and whether there is one."""
    settled = samples[round(SETTLED * len(samples)) :]
    steps = [s["step"] for s in settled]
    rates, held = ([s[key] for s in settled] for key in ("tokens_per_second", "rss_bytes"))
    mean, memory = statistics.mean(rates), line(steps, held)
    relative = tuple(figure / mean * SPAN for figure in line(steps, rates))
    return {
        "tokens_per_second": mean,
        "rate_change": relative,
        "rate_verdict": verdict(relative, RATE_BOUND),
        "rss_bytes": statistics.mean(held),
        "bytes_per_update": memory,
        "memory_verdict": verdict(memory, BYTES_BOUND),
    }


def line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and half its 95% interval."""
    count, mean_x, mean_y = len(x), statistics.mean(x), statistics.mean(y)
    square = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / square
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y))
    error = math.sqrt(rest / (count - 2) / square)
    return slope, statistics.NormalDist().inv_cdf(0.975) * error


def verdict(slope: tuple[float, ...], bound: float) -> str:
    """No slope where the interval covers 0 or the slope is below what matters, unless too wide."""
    if slope[1] > NOISE * bound:
        return "Too noisy to tell"
    return "No slope" if abs(slope[0]) <= max(slope[1], bound) else "There is a slope"


def tell(found: dict[str, float], steps: int) -> None:
    """A line of progress, a tenth of the run apart."""
    if found["step"] % max(1, steps // 10) == 0:
        rate, held = found["tokens_per_second"], found["rss_bytes"] / 2**30
        print(
            f"long: {found['step']:,} of {steps:,}, {rate:,.0f} tokens/s, {held:.3f} GiB",
            flush=True,
        )


def made_up_text(num_words: int) -> str:
    """Lines of words drawn from a few thousand made-up ones, common ones far more often."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    known = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(3000)]
    words = draw.choices(known, weights=[1 / rank for rank in range(1, 3001)], k=num_words)
    return "".join(" ".join(words[i : i + 12]) + ".\n" for i in range(0, num_words, 12))


def settings(defaults: tuple[str, ...], given: tuple[str, ...]) -> list[str]:
    """The defaults whose keys are not given, then what is given."""
    keys = {word.partition("=")[0] for word in given}
    return [*(word for word in defaults if word.partition("=")[0] not in keys), *given]


def environment(cache: Path | None = None) -> dict[str, str]:
    """Of a child: it finds this checkout's mule, and `cache` for what is compiled."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {}
    return {**os.environ, "PYTHONPATH": path, **kept}
