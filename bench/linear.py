"""Does cost grow linearly? A long run of a small model, and a table over sizes and row lengths.

    python bench/linear.py run                    # both, about half an hour on two cores
    python bench/linear.py run long steps=10000   # the long run alone
    python bench/linear.py run table minutes=40   # the table alone, with more time than 20 minutes
    python bench/linear.py smoke                  # both at tiny sizes; keeps nothing
    python bench/linear.py report                 # the section of docs/performance.md

The long run is `mule train` on made-up text in a process of its own, watched from outside: tokens a
second by the clock, and resident memory, every 100 updates. A straight line is fitted to each, and
the slope must be 0 within its 95% interval, or too small to matter. The table times whole updates,
each cell in a fresh process, in the micro-batch that a run would choose; the largest cells are left
out when they would not end in time, and the table says so. Settings of a recipe may follow, as
train.compile=false. Needs Linux.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linear_run import (
    BYTES_BOUND,
    EVERY,
    RATE_BOUND,
    ROOT,
    SPAN,
    TEXT_WORDS,
    environment,
    long_run,
    settings,
)
from train_timing import memory_bytes

from mule import fsio, machine
from mule.commands import bench, docs
from mule.errors import UserError
from mule.models import cost

RESULTS = ROOT / "bench" / "results" / "linear.json"
PAGE = docs.settings.DOCS / docs.PERFORMANCE_PAGE
COMMAND = "python bench/linear.py run"

SIZES, LENGTHS, MINUTES = ("1m", "10m", "25m", "125m", "350m"), (256, 1024, 4096), 20.0
SMALL, SMALL_VOCABULARY = ("1m", "10m"), 4096  # at which their names count (docs/sizes.md)
WARM_UP, TIMED = 1, 2  # updates of a cell, at least
TIMED_S = 2.0
START_S, SHARE = 45.0, 0.25  # what a cell takes before its updates, and their share of the peak
OVERHEAD_BYTES = 2**30  # torch, the compiler and what it loads


@dataclass(frozen=True)
class Plan:
    """How much to measure; `words` are settings of a recipe."""

    steps: int = 10_000
    minutes: float = MINUTES
    words: tuple[str, ...] = ()
    sizes: tuple[str, ...] = SIZES
    lengths: tuple[int, ...] = LENGTHS
    every: int = EVERY
    text_words: int = TEXT_WORDS


def run(parts: list[str], plan: Plan) -> None:
    """Measure the parts, `long` and `table`; what is finished is kept."""
    for part in parts or ["long", "table"]:
        found = long_of(plan) if part == "long" else table(plan)
        keep(part, found)
        report()


def long_of(plan: Plan) -> dict[str, Any]:
    """The long run that the plan wants."""
    return {"command": COMMAND, **long_run(plan.steps, plan.words, plan.every, plan.text_words)}


def keep(part: str, found: dict[str, Any]) -> None:
    """Write one part of the results, with the machine it was measured on."""
    kept = fsio.read_json(RESULTS) if RESULTS.is_file() else {"bench": "linear"}
    stamp = {"date": time.strftime("%Y-%m-%d"), "machine": machine.describe()}
    fsio.write_json(RESULTS, {**kept, part: {**found, **stamp}})


def smoke() -> None:
    """Both at tiny sizes; the figures mean nothing."""
    words = ("train.compile=false", "train.threads=1", "train.step_rows=2")
    tiny = Plan(200, 1.0, words, ("1m",), (16, 64), every=20, text_words=5_000)
    print(long_text(long_of(tiny) | {"date": "now", "machine": machine.describe()}))
    print(table_text(table(tiny) | {"date": "now", "machine": machine.describe()}))


# ---------------------------------------------------------------- the table


def table(plan: Plan) -> dict[str, Any]:
    """Every cell that fits into the memory and the time, the quick ones first."""
    cells = [cell_of(size, length, plan) for size in plan.sizes for length in plan.lengths]
    precision, threads = cells[0]["precision"], cells[0]["threads"]
    peaks = [machine.matmul_peak(precision, "cpu", threads, fresh=True)]
    for cell in cells:
        flops = (WARM_UP + TIMED) * cell["tokens_per_update"] * cell["flops_per_token"]
        cell["predicted_s"] = START_S + flops / (SHARE * peaks[0])
    cells.sort(key=lambda cell: cell["predicted_s"])
    total = sum(cell["predicted_s"] for cell in cells)
    print(
        f"table: {len(cells)} cells, about {total / 60:.0f} of {plan.minutes:g} minutes", flush=True
    )
    started_at = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mule-linear-") as cache:
        for cell in cells:
            spent = time.perf_counter() - started_at
            cell |= measured(cell, Path(cache), 60 * plan.minutes - spent)
            print(f"table: {cell['size']} at {cell['length']}: {cell_text(cell)}", flush=True)
    peaks.append(machine.matmul_peak(precision, "cpu", threads, fresh=True))
    return {"command": COMMAND, "minutes": plan.minutes, "peaks": peaks, "cells": cells}


def cell_of(size: str, length: int, plan: Plan) -> dict[str, Any]:
    """What one cell will train, and the memory it needs."""
    from mule.plan import memory
    from mule.plan.shape import new_model_config

    defaults = (f"model.vocab_size={SMALL_VOCABULARY}",) if size in SMALL else ()
    words = settings(defaults, plan.words)
    words = [f"model.size={size}", f"data.max_seq_length={length}", *words]
    resolved = bench._resolved(bench._recipe(words))
    config, train = new_model_config(resolved.recipe, 1), resolved.recipe.train
    params, micro = cost.total_params(config), int(train.micro_batch_rows)
    fixed = (f"train.micro_batch_rows={micro}", f"train.threads={train.threads}")
    state = memory.state_bytes(config, resolved.recipe, accumulates=micro < resolved.step_rows)
    token = memory.activation_bytes_per_token(config, train, str(train.activation_checkpointing))
    needed = sum(state.values()) + memory.loss_bytes(config, str(train.precision))
    needed += round(micro * length * token) + OVERHEAD_BYTES
    return {
        "size": size,
        "length": length,
        "words": settings(tuple(words), fixed),
        "params": params,
        "micro_batch_rows": micro,
        "precision": train.precision,
        "threads": int(train.threads),
        "tokens_per_update": resolved.step_rows * length,
        "flops_per_token": cost.train_flops_per_token(config, length),
        "needed_bytes": needed,
    }


def measured(cell: dict[str, Any], cache: Path, seconds_left: float) -> dict[str, Any]:
    """What the cell's process reports, or why there is nothing."""
    if cell["needed_bytes"] > machine.available_bytes():
        return {"left_out": f"needs about {cell['needed_bytes'] / 2**30:.0f} GiB"}
    if cell["predicted_s"] > seconds_left:
        return {"left_out": f"would take about {cell['predicted_s'] / 60:.0f} min"}
    command = [sys.executable, str(Path(__file__).resolve()), "cell", json.dumps(cell["words"])]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(cache)
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.startswith("hint:")]
        return {"left_out": ": ".join([f"ended with {done.returncode}", *said[-1:]])}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_cell(words: list[str]) -> dict[str, Any]:
    """Whole updates in this process: their time, and the most memory held."""
    import torch

    from mule.plan.shape import new_model_config
    from mule.train.assemble import model_and_optimizer
    from mule.train.step import train_step

    torch.manual_seed(0)
    resolved = bench._resolved(bench._recipe(words))
    config = new_model_config(resolved.recipe, 1)
    model, optimizer = model_and_optimizer(resolved.recipe, config, None)
    seconds: list[float] = []
    while len(seconds) < WARM_UP + TIMED or sum(seconds[WARM_UP:]) < TIMED_S:
        started_at = time.perf_counter()
        batches = bench._batches(resolved, config.vocab_size)
        train_step(model, optimizer, batches, lr=1e-4, max_grad_norm=1.0)
        seconds.append(time.perf_counter() - started_at)
    timed = seconds[WARM_UP:]
    tokens = resolved.step_rows * resolved.recipe.data.max_seq_length
    return {
        "first_update_s": seconds[0],
        "updates_s": timed,
        "tokens_per_second": tokens * len(timed) / sum(timed),
        "peak_bytes": memory_bytes("VmHWM"),
    }


# ---------------------------------------------------------------- the page


def report() -> None:
    """Write the section into the page."""
    page = PAGE.read_text(encoding="utf-8")
    fsio.write_text(PAGE, docs.with_generated(page, section(), "linear"))


def section(results: Path = RESULTS) -> str:
    """The text of docs/performance.md: the long run, then the table."""
    found = fsio.read_json(results) if results.is_file() else {}
    texts = [long_text(found["long"])] if "long" in found else []
    texts += [table_text(found["table"])] if "table" in found else []
    return "\n".join(texts) or f"Nothing is measured yet: `{COMMAND}`.\n"


def long_text(found: dict[str, Any]) -> str:
    """The long run in words."""
    change, width = (100 * figure for figure in found["rate_change"])
    grown, spread = found["bytes_per_update"]
    words = " ".join(found["words"])
    return (
        f"**{found['steps']:,} updates** of `mule train` ({words}), a sample every "
        f"{found['every']}:\n\n"
        f"- speed: {found['tokens_per_second']:,.0f} tokens a second; {change:+.2f}% in {SPAN:,} "
        f"updates (95% interval: {change - width:+.2f} to {change + width:+.2f}%). "
        f"**{found['rate_verdict']}.**\n"
        f"- memory: {found['rss_bytes'] / 2**30:.3f} GiB resident; {grown:+,.0f} bytes an update "
        f"({grown - spread:+,.0f} to {grown + spread:+,.0f}). **{found['memory_verdict']}.**\n\n"
        f"No slope means that the interval covers 0, or that the slope is below {RATE_BOUND:.0%} of the "
        f"speed in {SPAN:,} updates, or {BYTES_BOUND:,} bytes an update. {where(found)}\n"
    )


def where(found: dict[str, Any]) -> str:
    """The machine, the date and the command."""
    held, usual = found["machine"], {"steps": Plan.steps, "minutes": Plan.minutes}
    asked = [f" {key}={found[key]:g}" for key in usual if found.get(key, usual[key]) != usual[key]]
    command = found["command"] + "".join(asked)
    return f"{held['cpu']}, {held['cores']} cores, {found['date']}; `{command}`."


def table_text(found: dict[str, Any]) -> str:
    """The cells, by size and row length."""
    lines = [
        "| model | parameters | tokens a row | rows at once | tokens/s | share of peak | memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in sorted(found["cells"], key=lambda cell: (cell["params"], cell["length"])):
        head = f"| `{cell['size']}` | {cell['params'] / 1e6:.1f} M | {cell['length']:,} "
        if "left_out" in cell:
            lines.append(f"{head}| {cell['micro_batch_rows']} | left out: {cell['left_out']} | | |")
            continue
        share = cell["tokens_per_second"] * cell["flops_per_token"] / max(found["peaks"])
        lines.append(
            f"{head}| {cell['micro_batch_rows']} | {cell['tokens_per_second']:,.0f} "
            f"| {share:.1%} | {cell['peak_bytes'] / 2**30:.2f} GiB |"
        )
    return "\n".join(lines) + (
        f"\n\nUpdates of about {max(c['tokens_per_update'] for c in found['cells']):,} tokens, "
        f"{WARM_UP} to warm up and at least {TIMED} timed, {found['cells'][0]['precision']}; memory is "
        f"the most the process held. Peak: {max(found['peaks']) / 1e9:,.0f} GFLOP/s. {where(found)}\n"
    )


def cell_text(cell: dict[str, Any]) -> str:
    """A finished cell in one line."""
    if "left_out" in cell:
        return f"left out: {cell['left_out']}"
    return f"{cell['tokens_per_second']:,.0f} tokens/s, {cell['peak_bytes'] / 2**30:.2f} GiB"


# ---------------------------------------------------------------- words


def plan_of(words: list[str]) -> tuple[list[str], Plan]:
    """The parts to measure and how much, from the words after `run`."""
    parts = [word for word in words if "=" not in word]
    if unknown := [part for part in parts if part not in ("long", "table")]:
        raise UserError(f"there is no part called `{unknown[0]}`", "one of long, table")
    plan = Plan(words=tuple(word for word in words if "." in word.partition("=")[0]))
    for word in words:
        key, _, value = word.partition("=")
        if key == "steps":
            plan = replace(plan, steps=int(value))
        elif key == "minutes":
            plan = replace(plan, minutes=float(value))
        elif "=" in word and word not in plan.words:
            raise UserError(
                f"`{key}` says nothing here", "steps=N, minutes=N, or section.key=value"
            )
    return parts, plan


def main(words: list[str]) -> None:
    command, *rest = words or ["run"]
    if command == "cell":
        print(json.dumps(measure_cell(json.loads(rest[0]))))
    elif command == "run":
        run(*plan_of(rest))
    else:
        {"smoke": smoke, "report": report}[command]()


if __name__ == "__main__":
    main(sys.argv[1:])
