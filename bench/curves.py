"""How long the curves of a long run take: the first chart, a zoom, an update more, the list of runs.

    python -m bench.curves                 # 100,000 updates; half a minute, one core
    python -m bench.curves --updates 5000

The run is written as a training writes it, with made-up figures. Times are seconds of one core on the
server's side: reading the log, and what is made of it as JSON. Medians of five, but for what is first.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mule import machine
from mule.commands.columns import ColumnStore
from mule.commands.curves import curves
from mule.commands.runs import list_runs, summaries
from mule.run import Run

UPDATES, RUNS = 100_000, 200
_TIMES = 5


def make_run(root: Path, updates: int) -> Run:
    """A run of so many updates whose rows have all that a training logs."""
    run, draw = Run.create(root, "long", "model: {size: 10m}\n"), random.Random(7)
    run.write_resolved(f"train:\n  steps: {updates}\nevaluate:\n  every_steps: 1000\n")
    with run.lock():
        run.start_attempt(from_step=0)
        with (run.folder / "metrics.jsonl").open("w") as log:
            for step in range(1, updates + 1):
                log.write(json.dumps(_row(step, updates, draw), separators=(",", ":")) + "\n")
    return run


def _row(step: int, updates: int, draw: random.Random) -> dict[str, Any]:
    loss = 2.4 + 4.4 / (1 + 40 * step / updates)
    row: dict[str, Any] = {
        "at": 1.7e9 + 0.1 * step,
        "attempt": 1,
        "step": step,
        "epoch": step / 5000,
        "loss": loss + draw.gauss(0, 0.06),
        "learning_rate": 0.003 * (0.5 + 0.5 * math.cos(math.pi * step / updates)),
        "grad_norm": math.exp(draw.gauss(-0.5, 0.3)),
        "num_targets": 8192,
        "memory_bytes": 4_000_000_000 + step,
        "memory_now_bytes": 3_900_000_000 + draw.randint(0, 10**7),
        "tokens_per_second": draw.gauss(8000, 300),
        "steps_per_second": draw.gauss(10, 0.4),
        "share_of_peak": draw.gauss(0.4, 0.01),
        "core_wait_share": 0.05,
    }
    if step % 1000 == 0:
        row |= {"val_loss": loss + 0.1, "val_perplexity": math.exp(loss + 0.1)}
    return row


def measure(folder: Path, updates: int, num_runs: int) -> dict[str, Any]:
    """Seconds of a core for each, and the sizes they go with."""
    run, store = make_run(folder / "runs", updates), ColumnStore()
    sent: list[int] = []

    def drawn(**options: Any) -> None:
        found = store.use(run, lambda columns: curves(columns, **options))
        sent.append(len(json.dumps(found)))

    def appended() -> None:
        with run.lock():
            last = store.use(run, lambda columns: int(columns.steps[-1]))
            run.log_metrics(_row(last + 1, updates, random.Random(last)))
        drawn()

    result: dict[str, Any] = {
        "machine": machine.describe()["cpu"],
        "updates": updates,
        "log_bytes": (run.folder / "metrics.jsonl").stat().st_size,
        "first_chart_s": _seconds(drawn, times=1),
        "again_s": _seconds(drawn),
        "zoom_s": _seconds(lambda: drawn(first=updates // 4, last=updates // 2)),
        "append_s": _seconds(appended),
    }
    result["sent_bytes"] = max(sent)
    shutil.rmtree(run.folder)
    model = make_run(folder / "runs", 500)
    for place in range(num_runs - 1):
        shutil.copytree(model.folder, folder / "runs" / f"run-{place}")
    kept = summaries()
    result["runs"] = num_runs
    result["list_first_s"] = _seconds(lambda: list_runs(folder / "runs", kept), times=1)
    result["list_again_s"] = _seconds(lambda: list_runs(folder / "runs", kept))
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def _seconds(call: Callable[[], Any], times: int = _TIMES) -> float:
    taken = []
    for _ in range(times):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return round(statistics.median(taken), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--runs", type=int, default=RUNS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), given.updates, given.runs), indent=2))


if __name__ == "__main__":
    main()
