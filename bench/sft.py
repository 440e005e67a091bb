"""Supervised fine-tuning beside TRL: Alpaca and GSM8K, packed, all weights trained.

    python bench/data.py setup                 # TRL in an environment of its own: bench/peers/trl
    python bench/sft.py smoke                  # every way once at a tiny shape; keeps nothing
    python bench/sft.py run                    # the 124M shape, three rounds
    python bench/sft.py run mule trl-rows rounds=1 updates=2   # some ways, less of it
    python bench/sft.py report                 # the table of docs/performance.md

Both train the same chats with the same tokenizer, model shape (random weights), row length, rows an
update, arithmetic and optimizer, and learn from what the assistant says only. Mule's way is
`mule train`, from prepared rows to its log; TRL's is SFTTrainer with packing=True, in the four
variants that bench/sft_trl.py explains. What counts is trained tokens a second, of whole updates.
Each way runs in a process of its own, in turn; the compiler's cache is kept between rounds, so
that the first update of round one is the one that compiles. `run` writes
bench/results/peers-sft.json after each round.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from train import ROOT, Way, config_of, job_of, one_way
from train_timing import RunJob, begin, figures, split, targets_per_second, versions

from mule import fsio, machine
from mule.commands import docs
from mule.errors import UserError
from mule.models import cost

RESULTS = ROOT / "bench" / "results" / "peers-sft.json"
PAGE = docs.settings.DOCS / docs.PERFORMANCE_PAGE
SHARED = ROOT.parent / "shared" / "data"
CHATS = (
    *("alpaca/alpaca_en_demo.json", "alpaca/alpaca_data_cleaned_first500.json"),
    *("alpaca/instruction-data.json", "gsm8k/train.jsonl"),
)
TOKENIZER_SIZE, SMOKE_CHATS = 16_384, 200
ROUNDS, UPDATES = 3, 4
_SETUP = "python bench/data.py setup"

WAYS = {
    "mule": Way("**Mule**", "sft.py", None, "one"),
    "trl": Way(
        "TRL, its defaults (gradient checkpointing)", "sft_trl.py", "trl", "default", _SETUP
    ),
    "trl-kept": Way("TRL, activations kept", "sft_trl.py", "trl", "kept", _SETUP),
    "trl-rows": Way("TRL, activations kept, row by row", "sft_trl.py", "trl", "rows", _SETUP),
    "trl-compiled": Way("the same, torch_compile", "sft_trl.py", "trl", "compiled", _SETUP),
}


def run(names: list[str], rounds: int = ROUNDS, updates: int = UPDATES) -> None:
    """Measure the ways in turn; a finished round is kept at once."""
    if unknown := [name for name in names if name not in WAYS]:
        raise UserError(f"there is no way called `{unknown[0]}`", f"some of {', '.join(WAYS)}")
    precision = "bf16" if machine.has_fast_bf16() else "fp32"
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        job = sft_job("124m", Path(name), precision, updates)
        make_inputs(Path(name), SHARED, TOKENIZER_SIZE)
        for number in range(rounds):
            found.append(_round(job, names or list(WAYS), f"{number + 1}/{rounds}"))
            fsio.write_json(RESULTS, _described(job, found))
            report()


def smoke() -> None:
    """Every way once at a tiny shape; the figures mean nothing."""
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), SHARED, 300, SMOKE_CHATS)
        _round(sft_job("tiny", Path(name), "fp32", 2), list(WAYS), "tiny")


def report() -> None:
    """Write the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    fsio.write_text(PAGE, docs.with_generated(page, table(), "sft"))


def sft_job(shape: str, folder: Path, precision: str, updates: int) -> RunJob:
    """The job of a shape: 8 rows an update, two updates before the timed ones."""
    job = job_of(shape)
    more = {"folder": str(folder), "precision": precision}
    if shape == "tiny":
        job = replace(job, row_length=256)  # most chats have no place in less
    return RunJob(**(asdict(job) | more | {"rows": 8, "warm_up": 2, "timed": updates}))


def make_inputs(folder: Path, shared: Path, tokenizer_size: int, most: int | None = None) -> None:
    """chat.jsonl, rows of messages, at `most` so many; and the tokenizer trained on them."""
    from itertools import islice

    from mule.data.sources import Conversation, expand, read
    from mule.tokenizer import Tokenizer

    items = islice(read(expand([shared / name for name in CHATS])), most)
    chats = [item.as_dicts() for item in items if isinstance(item, Conversation)]
    lines = (json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats)
    (folder / "chat.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = (message["content"] for chat in chats for message in chat)
    Tokenizer.train(texts, tokenizer_size).save(folder / "tokenizer")


# ---------------------------------------------------------------- one way


def _round(job: RunJob, names: list[str], label: str) -> dict[str, Any]:
    """The ways once, one after the other: what was found, by way."""
    found = {}
    for name in names:
        cache = Path(job.folder) / "compiled" / name
        found[name] = one_way(WAYS[name], job, cache)
        print(f"{label} {name}: {json.dumps(found[name])}", flush=True)
    return found


def mule_figures(job: RunJob) -> dict[str, Any]:
    """`mule train` on the chats."""
    from train_run import trained

    import mule

    baseline = begin(job)
    words = [f"data.train=[{job.folder}/chat.jsonl]", "data.format=messages"]
    found = trained(job, f"sft-{time.time_ns()}", words)
    shards, seconds = found["shards"], found["seconds"]
    state = 12 * cost.total_params(config_of(job))
    tokens = [round(job.rows * shards.num_tokens / shards.num_rows)] * len(seconds)
    return figures(job, seconds, found["losses"], baseline=baseline, state=state) | {
        "tokens_per_second": targets_per_second(job, seconds, tokens),
        "targets_per_second": targets_per_second(job, seconds, found["targets"]),
        "targets_per_update": statistics.mean(found["targets"]),
        "rows_at_once": found["settings"].micro_batch_rows,
        "versions": {**versions(), "mule": mule.__version__},
    }


# ---------------------------------------------------------------- the table


def _described(job: RunJob, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds with what they are computed from; no path of this machine."""
    return {
        "bench": "peers-sft",
        "command": "python bench/sft.py run",
        "date": time.strftime("%Y-%m-%d"),
        "job": {key: value for key, value in asdict(job).items() if key != "folder"},
        "params": cost.total_params(config_of(job)),
        "rounds": rounds,
        "machine": machine.describe(),
    }


def table(results: Path = RESULTS) -> str:
    """The table of docs/performance.md, and what it was measured on."""
    if not results.is_file():
        return f"Nothing is measured yet: `{_SETUP}`, then `python bench/sft.py run`.\n"
    found = fsio.read_json(results)
    head = (
        "| way | trained tokens/s (median, min-max) | Mule is faster by | all tokens/s "
        "| loss | memory | first update |"
    )
    rows = {name: _row(found["rounds"], name) for name in found["rounds"][0]}
    lines = [_line(WAYS[name].title, row) for name, row in rows.items()]
    return "\n".join([head, "|---|--:|--:|--:|--:|--:|--:|", *lines, "", _note(found, rows)]) + "\n"


def _row(rounds: list[dict[str, Any]], name: str) -> dict[str, float]:
    """The figures of one way over the rounds; ratios are taken within a round."""
    rates = [r[name]["targets_per_second"] for r in rounds]
    ratios = [r["mule"]["targets_per_second"] / r[name]["targets_per_second"] for r in rounds]
    return {
        "rate": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "ratio": statistics.median(ratios),
        "all": statistics.median(r[name]["tokens_per_second"] for r in rounds),
        "loss": rounds[0][name]["loss"],
        "memory": statistics.median(r[name]["peak_bytes"] for r in rounds),
        "first_s": rounds[0][name]["first_update_s"],
    }


def _line(title: str, row: dict[str, float]) -> str:
    cells = (
        f"{row['rate']:,.0f} ({row['lowest']:,.0f}-{row['highest']:,.0f})",
        f"{row['ratio']:.2f}x",
        f"{row['all']:,.0f}",
        f"{row['loss']:.2f}",
        f"{row['memory'] / 2**30:.2f} GiB",
        f"{row['first_s']:.0f} s",
    )
    return f"| {title} | {' | '.join(cells)} |"


def _note(found: dict[str, Any], rows: dict[str, dict[str, float]]) -> str:
    """How Mule compares with TRL's fastest variant, and on what this was measured."""
    job, first = found["job"], found["rounds"][0]
    peers = [name for name in rows if name != "mule"]
    names: dict[str, str] = {}
    for name in rows:
        names |= first[name]["versions"]
    used = ", ".join(f"{package} {version}" for package, version in sorted(names.items()))
    against = ""
    if peers:
        fastest = min(peers, key=lambda name: rows[name]["ratio"])
        against = (
            f"Mule trains **{rows[fastest]['ratio']:.2f} times** the tokens a second of TRL's "
            f"fastest variant ({WAYS[fastest].title}). "
        )
    return (
        f"{against}{found['params'] / 1e6:.1f} M parameters, {job['precision']}, {job['rows']} rows "
        f"of {job['row_length']:,} tokens an update, of which Mule trains "
        f"{first['mule']['targets_per_update']:,.0f} in {first['mule']['rows_at_once']} rows at once. "
        f"Rounds: {len(found['rounds'])}, {job['timed']} timed updates each after "
        f"{job['warm_up']}. {found['machine']['cpu']}, {job['threads']} threads, {found['date']}; "
        f"{used}; `{found['command']}`."
    )


def main(words: list[str]) -> None:
    command, *rest = words or ["run"]
    if command == "one":
        print(json.dumps(mule_figures(RunJob(**json.loads(rest[0])))))
    elif command == "run":
        ways, numbers = split(rest)
        run(ways, **numbers)
    else:
        {"smoke": smoke, "report": report}[command]()


if __name__ == "__main__":
    main(sys.argv[1:])
