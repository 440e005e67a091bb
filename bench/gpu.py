"""Pretraining of the 124M shape on a CUDA card: tokens a second and MFU.

    python bench/gpu.py run      # bf16, fp8 where the card and torchao have it, and the plain step
    python bench/gpu.py smoke    # the same at a tiny shape on the CPU; keeps nothing
    python bench/gpu.py report   # the table of docs/performance.md

Mule's way is `mule train`: prepared rows of a made-up text, 524,288 tokens an update, compiled, the
rows at once chosen by the run itself. The peer is bench/gpu_plain.py. Each way runs in a process of
its own, after and before a measurement of the matmul peak. `run` writes bench/results/gpu.json.
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from train import ROOT, Way, config_of, job_of, one_way
from train_timing import RunJob, begin, gpu_figures, versions

from mule import fsio, machine
from mule.commands import docs
from mule.errors import UserError
from mule.models import cost

RESULTS = ROOT / "bench" / "results" / "gpu.json"
PAGE = docs.settings.DOCS / docs.PERFORMANCE_PAGE
STEP_TOKENS = 524_288
PLANNED_UPDATES = 20_000  # of a run long enough to try micro-batch sizes; stopped when measured
FLOAT8_CAPABILITY = (8, 9)  # Ada and Hopper
WAYS = {
    "mule-bf16": Way("**Mule**, bf16", "gpu.py", None, "one"),
    "mule-fp8": Way("**Mule**, fp8", "gpu.py", None, "one"),
    "plain": Way("plain step, bf16", "gpu_plain.py", None, "adamw"),
}
# Dense bf16 FLOP/s by the name of the card, the first that fits; from NVIDIA's data sheets.
PUBLISHED = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
_NUM_WORDS, _LINES, _WORDS_A_LINE = 3_000, 60_000, 20  # of the made-up text: 1.4 million tokens


def run(names: list[str]) -> None:
    """Measure the ways in turn on the first card."""
    import torch

    if unknown := [name for name in names if name not in WAYS]:
        raise UserError(f"there is no way called `{unknown[0]}`", f"some of {', '.join(WAYS)}")
    if not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA card here to measure", "run it where torch.cuda.is_available() holds"
        )
    with tempfile.TemporaryDirectory() as folder:
        job = gpu_job("124m", Path(folder), "cuda")
        make_inputs(Path(folder), _LINES, 4_096)
        found = {"peaks": [_peak()]} | _all(job, names or _possible(torch))
        found["peaks"].append(_peak())
    fsio.write_json(RESULTS, _described(job, found, torch.cuda.get_device_name()))
    report()


def smoke() -> None:
    """Mule in bf16 and the plain step once at a tiny shape on the CPU; the figures mean nothing."""
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), 200, 300)
        _all(gpu_job("tiny", Path(folder), "cpu"), ["mule-bf16", "plain"])


def report() -> None:
    """Write the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    fsio.write_text(PAGE, docs.with_generated(page, table(), "gpu"))


def gpu_job(shape: str, folder: Path, device: str) -> RunJob:
    """The job of a shape: three updates before ten timed ones."""
    job = job_of(shape)
    more = {"folder": str(folder), "precision": "bf16", "device": device}
    if shape != "tiny":
        more |= {"rows": STEP_TOKENS // job.row_length, "warm_up": 3, "timed": 10}
    return RunJob(**(asdict(job) | more))


def make_inputs(folder: Path, lines: int, tokenizer_size: int) -> None:
    """text.txt of made-up words, and a tokenizer trained on it."""
    from mule.tokenizer import Tokenizer

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(_NUM_WORDS)]
    text = [" ".join(rng.choices(words, k=_WORDS_A_LINE)) for _ in range(lines)]
    (folder / "text.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    Tokenizer.train(text[:2_000], tokenizer_size).save(folder / "tokenizer")


# ---------------------------------------------------------------- one way


def _possible(torch: Any) -> list[str]:
    """All ways but float8, where the card or the package for it is missing."""
    capable = torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY
    float8 = capable and importlib.util.find_spec("torchao") is not None
    return [name for name in WAYS if name != "mule-fp8" or float8]


def _all(job: RunJob, names: list[str]) -> dict[str, Any]:
    """The ways once, one after the other: what was found, by way."""
    found = {}
    for name in names:
        its_job = replace(job, precision="fp8") if name == "mule-fp8" else job
        found[name] = one_way(WAYS[name], its_job, Path(job.folder) / "compiled" / name)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    return found


def _peak() -> float:
    """The bf16 matmul peak of the card, in a process of its own."""
    words = [sys.executable, str(ROOT / "bench" / "gpu.py"), "peak"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def mule_figures(job: RunJob) -> dict[str, Any]:
    """`mule train` on the text."""
    from train_run import trained

    import mule

    begin(job)
    words = [f"data.train=[{job.folder}/text.txt]", "data.format=text"]
    found = trained(job, f"gpu-{job.precision}", words, planned=PLANNED_UPDATES)
    return gpu_figures(job, found["seconds"], found["losses"]) | {
        "rows_at_once": found["settings"].micro_batch_rows,
        "versions": {**versions(), "mule": mule.__version__},
    }


# ---------------------------------------------------------------- the table


def _described(job: RunJob, found: dict[str, Any], card: str) -> dict[str, Any]:
    """What was found with what it is computed from; no path of this machine."""
    config = config_of(job)
    return {
        "bench": "gpu",
        "command": "python bench/gpu.py run",
        "date": time.strftime("%Y-%m-%d"),
        "card": card,
        "published_flops": published_flops(card),
        "job": {key: value for key, value in asdict(job).items() if key != "folder"},
        "params": cost.total_params(config),
        "flops_per_token": cost.train_flops_per_token(config, job.row_length),
        "found": found,
        "machine": machine.describe(),
    }


def published_flops(card: str) -> float | None:
    """The card's dense bf16 FLOP/s by its name; None for one that is not in the table."""
    return next((flops for name, flops in PUBLISHED.items() if name in card), None)


def table(results: Path = RESULTS) -> str:
    """The table of docs/performance.md, and what it was measured on."""
    if not results.is_file():
        return "Not measured yet: `python bench/gpu.py run` on a machine with a CUDA card.\n"
    result = fsio.read_json(results)
    head = (
        "| way | tokens/s | MFU | of measured | an update: median (min-max) "
        "| rows at once | memory (reserved) | first update |"
    )
    ways = [name for name in WAYS if name in result["found"]]
    lines = [_line(result, name) for name in ways]
    return "\n".join([head, "|---|--:|--:|--:|--:|--:|--:|--:|", *lines, "", _note(result)]) + "\n"


def _line(result: dict[str, Any], name: str) -> str:
    found, published = result["found"][name], result["published_flops"]
    flops = found["tokens_per_second"] * result["flops_per_token"]
    times = found["updates_s"]
    cells = (
        f"{found['tokens_per_second']:,.0f}",
        f"**{flops / published:.1%}**" if published else "-",
        f"{flops / max(result['found']['peaks']):.1%}",
        f"{statistics.median(times):.3f} s ({min(times):.3f}-{max(times):.3f})",
        str(found["rows_at_once"]),
        f"{found['peak_bytes'] / 2**30:.1f} ({found['reserved_bytes'] / 2**30:.1f}) GiB",
        f"{found['first_update_s']:.0f} s",
    )
    return f"| {WAYS[name].title} | {' | '.join(cells)} |"


def _note(result: dict[str, Any]) -> str:
    """How Mule compares with the plain step, and on what this was measured."""
    found, job = result["found"], result["job"]
    against = ""
    if "mule-bf16" in found and "plain" in found:
        ratio = found["mule-bf16"]["tokens_per_second"] / found["plain"]["tokens_per_second"]
        against = (
            f"In bf16 Mule makes **{ratio:.2f} times** the tokens a second of the plain step. "
        )
    published = result["published_flops"]
    named = f"{published / 1e12:,.0f} TFLOP/s published" if published else "no published peak known"
    package = next(way for name, way in found.items() if name != "peaks")["versions"]["torch"]
    return (
        f"{against}{result['params'] / 1e6:.1f} M parameters, {job['rows']} rows of "
        f"{job['row_length']:,} tokens an update; {job['timed']} timed updates after "
        f"{job['warm_up']}. {result['card']}: {named}, {max(found['peaks']) / 1e12:,.0f} measured. "
        f"{result['date']}, torch {package}; `{result['command']}`."
    )


def main(words: list[str]) -> None:
    command, *rest = words or ["run"]
    if command == "one":
        print(json.dumps(mule_figures(RunJob(**json.loads(rest[0])))))
    elif command == "peak":
        print(machine.matmul_peak("bf16", "cuda", fresh=True))
    elif command == "run":
        run(rest)
    else:
        {"smoke": smoke, "report": report}[command]()


if __name__ == "__main__":
    main(sys.argv[1:])
