"""Pretraining beside its peers: the same shape, rows and micro-batch, one after the other.

    python bench/train.py setup            # the peers' environments: bench/peers/hf and litgpt
    python bench/train.py smoke            # every way once at a tiny shape; keeps nothing
    python bench/train.py run              # both shapes, five rounds; for less:
    python bench/train.py run 124m rounds=3 updates=4
    python bench/train.py report           # the table of docs/performance.md

Every way trains whole updates on random tokens, 1,024 a row, in a fresh process, in turn, round after
round: mule (as `mule bench train` does), a plain PyTorch loop, HF Trainer without and with
torch_compile, LitGPT. All in bf16 arithmetic (fp32 where the processor has no bf16 products) over
fp32 weights, with AdamW and clipping. A round also
measures the matmul peak, and the compiler's cache is kept between rounds, so that the first update
of round one is the one that compiles everything. `run` writes bench/results/peers-train.json after
each round.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import fsio, machine
from mule.commands import docs
from mule.errors import UserError
from mule.models import cost
from mule.models.config import ModelConfig, named_size

if TYPE_CHECKING:
    from train_timing import Job

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"
RESULTS = ROOT / "bench" / "results" / "peers-train.json"
PAGE = docs.settings.DOCS / docs.PERFORMANCE_PAGE
SHAPES = ("25m", "124m")
ROUNDS, THREADS, ROW_LENGTH = 5, 2, 1024
PRECISION = "bf16" if machine.has_fast_bf16() else "fp32"
# LitGPT needs an older huggingface-hub than constraints.txt has, so torch alone is pinned for it.
SETUPS = {
    "hf": ("-c", str(ROOT / "constraints.txt"), "transformers", "accelerate", "torch"),
    "litgpt": ("litgpt==0.5.13", "torch==2.13.0"),
}


@dataclass(frozen=True)
class Way:
    """How one way is run: a script, an environment below bench/peers, and the script's variant.

    `setup` makes that environment. Mule's way is the benchmark's own script, with the word `one`.
    `preload` is a library of the system's that stands in for one that the way brings.
    """

    title: str
    script: str
    environment: str | None
    variant: str
    setup: str = "python bench/train.py setup"
    preload: str | None = None


# Tried: AdamW on the weights of 25m takes 45 ms fused, 300 ms as foreach or tensor by tensor (which
# LitGPT has on a CPU), so all peers have it fused. Precision is what each has as its default or asks
# for: autocast over fp32 weights. bf16-true of LitGPT keeps no fp32 weights, so it is another job.
WAYS = {
    "mule": Way("**Mule**", "train.py", None, "one"),
    "plain": Way("plain PyTorch loop, compiled", "train_plain.py", None, "fused"),
    "hf": Way("HF Trainer", "train_hf.py", "hf", "eager"),
    "hf-compiled": Way("HF Trainer, torch_compile", "train_hf.py", "hf", "compiled"),
    "litgpt": Way("LitGPT, compiled", "train_litgpt.py", "litgpt", "fused"),
}


def job_of(shape: str) -> Job:
    """The shape and the amount of work called `shape`: 25m, 124m, or tiny for the smoke run."""
    from train_timing import Job

    if shape == "124m":  # GPT-2's, its vocabulary padded; SwiGLU as wide as keeps the count
        return Job(50_304, 768, 12, 12, 12, 2048, ROW_LENGTH, 4, 2, 5, THREADS, PRECISION)
    size = named_size("25m" if shape == "25m" else "1m")
    job = Job(
        vocab_size=32_768,
        hidden_size=size.hidden_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=size.num_kv_heads,
        intermediate_size=size.intermediate_size,
        row_length=ROW_LENGTH,
        rows=8,
        warm_up=3,
        timed=10,
        threads=THREADS,
        precision=PRECISION,
    )
    if shape == "tiny":
        return replace(job, vocab_size=512, row_length=64, rows=2, warm_up=1, timed=2, threads=1)
    return job


def setup() -> None:
    """Make the peers' environments."""
    for name, packages in SETUPS.items():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS / name)], check=True)
        pip = [str(PEERS / name / "bin" / "python"), "-m", "pip", "install"]
        subprocess.run([*pip, *packages], check=True)


def run(shapes: list[str], rounds: int = ROUNDS, updates: int | None = None) -> None:
    """Measure the shapes, all ways in turn; a finished round is kept at once."""
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        raise UserError(f"there is no shape called `{unknown[0]}`", f"one of {', '.join(SHAPES)}")
    kept = fsio.read_json(RESULTS)["shapes"] if RESULTS.is_file() else {}
    for shape in shapes or SHAPES:
        job = job_of(shape)
        job = replace(job, timed=updates or job.timed)
        with tempfile.TemporaryDirectory() as cache:
            found: list[dict[str, Any]] = []
            for number in range(rounds):
                found.append(_round(job, Path(cache), f"{shape} {number + 1}/{rounds}"))
                kept[f"{shape}, {job.precision}"] = _described(job, found)
                fsio.write_json(RESULTS, {"bench": "peers-train", "shapes": kept})
                report()


def smoke() -> None:
    """Every way once at a tiny shape; the figures mean nothing."""
    with tempfile.TemporaryDirectory() as cache:
        _round(job_of("tiny"), Path(cache), "tiny")


def report() -> None:
    """Write the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    fsio.write_text(PAGE, docs.with_generated(page, table(), "peers"))


# ---------------------------------------------------------------- one way


def _round(job: Job, cache: Path, label: str) -> dict[str, Any]:
    """Every way once, and the peak before and after them: what was found, by way."""
    found = {"peaks": [_peak()]}
    for name, way in WAYS.items():
        found[name] = one_way(way, job, cache / name)
        print(f"{label} {name}: {json.dumps(found[name])}", flush=True)
    found["peaks"].append(_peak())
    return found


def one_way(way: Way, job: Job, cache: Path) -> dict[str, Any]:
    """What a way reports from a process of its own."""
    python = Path(sys.executable)
    if way.environment:
        python = PEERS / way.environment / "bin" / "python"
        if not python.is_file():
            raise UserError(
                f"{way.title} cannot be measured: bench/peers/{way.environment} is missing",
                f"make it: {way.setup}",
            )
    words = [json.dumps(asdict(job)), way.variant]
    if way.variant == "one":
        words.reverse()
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": str(job.threads),
        "HF_HUB_OFFLINE": "1",
    }
    if way.preload:
        environment["LD_PRELOAD"] = _library(way)
    command = [str(python), str(ROOT / "bench" / way.script), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _library(way: Way) -> str:
    """The library that the way is run with. Without it the loader would only complain, and go on."""
    assert way.preload
    found = ctypes.util.find_library(way.preload)
    if found is None:
        raise UserError(
            f"{way.title} cannot be measured: lib{way.preload} is not on this machine",
            f"install it: apt-get install lib{way.preload}0",
        )
    return found


def _peak() -> float:
    """The matmul peak in a process of its own."""
    words = [sys.executable, str(ROOT / "bench" / "train.py"), "peak"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def mule_figures(job: Job) -> dict[str, Any]:
    """Mule's own updates, as `mule bench train` makes them."""
    from train_timing import begin, figures, time_updates, versions

    import mule
    from mule.commands import bench
    from mule.config.load import load_recipe
    from mule.train.assemble import model_and_optimizer
    from mule.train.step import train_step

    baseline = begin(job)
    resolved = bench._resolved(load_recipe(None, _words(job), complete=False).recipe)
    model, optimizer = model_and_optimizer(resolved.recipe, config_of(job), None)

    def update() -> float:
        batches = bench._batches(resolved, job.vocab_size)
        return train_step(model, optimizer, batches, lr=1e-4, max_grad_norm=1.0).loss

    seconds, losses = time_updates(job, update)
    state = optimizer.state_bytes()
    found = figures(job, seconds, losses, baseline=baseline, state=state)
    return {**found, "versions": {**versions(), "mule": mule.__version__}}


def config_of(job: Job) -> ModelConfig:
    """The model of the job, as all ways have it: Llama with a tied head."""
    return ModelConfig(
        family="llama",
        vocab_size=job.vocab_size,
        hidden_size=job.hidden_size,
        num_layers=job.num_layers,
        num_heads=job.num_heads,
        num_kv_heads=job.num_kv_heads,
        head_dim=job.head_dim,
        intermediate_size=job.intermediate_size,
        max_position_embeddings=job.row_length,
    )


def _words(job: Job) -> list[str]:
    """The job as settings of a recipe."""
    shape = (
        *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
        "intermediate_size",
    )
    return [
        "model.family=llama",
        *(f"model.{name}={getattr(job, name)}" for name in shape),
        f"data.max_seq_length={job.row_length}",
        *(f"train.{name}={job.rows}" for name in ("step_rows", "micro_batch_rows")),
        *("train.steps=1000", "train.compile=true", "train.device=cpu"),
        f"train.precision={job.precision}",
        f"train.threads={job.threads}",
    ]


# ---------------------------------------------------------------- the table


def _described(job: Job, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds of a shape with what they are computed from."""
    config = config_of(job)
    return {
        "command": "python bench/train.py run",
        "date": time.strftime("%Y-%m-%d"),
        "job": asdict(job),
        "params": cost.total_params(config),
        "flops_per_token": cost.train_flops_per_token(config, job.row_length),
        "rounds": rounds,
        "machine": machine.describe(),
    }


def table(results: Path = RESULTS) -> str:
    """The table of docs/performance.md, and what it says about each shape."""
    if not results.is_file():
        return "Nothing is measured yet: `python bench/train.py setup`, then `run`.\n"
    head = (
        "| model | way | tokens/s (median, min-max) | Mule is faster by | useful GFLOP/s "
        "| share of peak | memory | of it state | first update |"
    )
    lines, notes = [head, "|---|---|--:|--:|--:|--:|--:|--:|--:|"], []
    for shape, found in fsio.read_json(results)["shapes"].items():
        rows = {name: _row(found, name) for name in WAYS if name in found["rounds"][0]}
        lines += [_line(shape, WAYS[name].title, row) for name, row in rows.items()]
        notes.append(_note(shape, found, rows))
    return "\n".join([*lines, "", *notes]) + "\n"


def _row(found: dict[str, Any], name: str) -> dict[str, float]:
    """The figures of one way over the rounds; ratios are taken within a round."""
    rounds = found["rounds"]
    rates = [r[name]["tokens_per_second"] for r in rounds]
    flops = statistics.median(rates) * found["flops_per_token"]
    return {
        "rate": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "ratio": statistics.median(
            r["mule"]["tokens_per_second"] / r[name]["tokens_per_second"] for r in rounds
        ),
        "flops": flops,
        "share": flops / _highest_peak(rounds),
        "memory": statistics.median(r[name]["peak_bytes"] for r in rounds),
        "state": rounds[0][name]["state_bytes"],
        "first_s": rounds[0][name]["first_update_s"],
    }


def _highest_peak(rounds: list[dict[str, Any]]) -> float:
    """Other work can only lower the peak, so the highest one counts."""
    return max(peak for r in rounds for peak in r["peaks"])


def _line(shape: str, title: str, row: dict[str, float]) -> str:
    cells = (
        f"{row['rate']:,.0f} ({row['lowest']:,.0f}-{row['highest']:,.0f})",
        f"{row['ratio']:.2f}x",
        f"{row['flops'] / 1e9:,.0f}",
        f"{row['share']:.1%}",
        f"{row['memory'] / 2**30:.2f} GiB",
        f"{row['state'] / 2**30:.2f} GiB",
        f"{row['first_s']:.0f} s",
    )
    return f"| {shape} | {title} | {' | '.join(cells)} |"


def _note(shape: str, found: dict[str, Any], rows: dict[str, dict[str, float]]) -> str:
    """How Mule compares with the fastest and the leanest peer, and on what this was measured."""
    peers = [name for name in rows if name != "mule"]
    fastest = min(peers, key=lambda name: rows[name]["ratio"])
    leanest = min(peers, key=lambda name: rows[name]["memory"])
    mine, theirs = rows["mule"], rows[leanest]
    without_state = (mine["memory"] - mine["state"]) / (theirs["memory"] - theirs["state"])
    job, machine_, first = found["job"], found["machine"], found["rounds"][0]
    names: dict[str, str] = {}
    for name in rows:
        names |= first[name]["versions"]
    used = ", ".join(f"{package} {version}" for package, version in sorted(names.items()))
    return (
        f"- **{shape}**: {found['params'] / 1e6:.1f} M parameters, {job['rows']} rows of "
        f"{job['row_length']:,} tokens an update, all at once. Mule makes "
        f"**{rows[fastest]['ratio']:.2f} times** the tokens a second of the fastest peer "
        f"({WAYS[fastest].title}) in **{mine['memory'] / theirs['memory']:.0%}** of the memory of the "
        f"leanest ({WAYS[leanest].title}); without the state in {without_state:.0%}. Rounds: "
        f"{len(found['rounds'])}, {job['timed']} timed updates each after {job['warm_up']}. "
        f"Peak: {_highest_peak(found['rounds']) / 1e9:,.0f} GFLOP/s. {machine_['cpu']}, "
        f"{job['threads']} threads, {found['date']}; {used}; `{found['command']}`."
    )


def main(words: list[str]) -> None:
    from train_timing import Job, split

    command, *rest = words or ["run"]
    if command == "one":
        print(json.dumps(mule_figures(Job(**json.loads(rest[0])))))
    elif command == "peak":
        print(machine.matmul_peak(PRECISION, "cpu", THREADS, fresh=True))
    elif command == "run":
        shapes, numbers = split(rest)
        run(shapes, **numbers)
    else:
        {"setup": setup, "smoke": smoke, "report": report}[command]()


if __name__ == "__main__":
    main(sys.argv[1:])
