"""Answering beside peers: transformers' generate, and llama.cpp, on the same weights.

    python bench/train.py setup    # transformers in an environment of its own: bench/peers/hf
    python bench/serve.py smoke    # every way once at a tiny shape; keeps nothing
    python bench/serve.py run      # one round, all ways in turn: a few minutes; for less:
    python bench/serve.py run mule-bf16 llamacpp rounds=3
    python bench/serve.py report   # the table of docs/performance.md

A Llama of 126 M parameters (768 wide, 16 blocks, 12 heads on 4, a vocabulary of 32,768, tied) with
random weights, saved once as a folder, and as an f16 GGUF by Mule's writer. Each way runs in a process
of its own, greedy, without stop tokens: prefill of 512 tokens; decoding 1, 4 and 16 answers at once;
and 16 requests of many lengths that come together. The bandwidth of reading memory is measured in
the same round: whoever reads every weight once for each token cannot be faster at batch 1. `run`
writes bench/results/serve.json after each round.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_job import Answers, Generate, ServeJob, figures
from train import ROOT, THREADS, Way, config_of, one_way
from train_timing import split

from mule import fsio, machine
from mule.commands import docs
from mule.errors import UserError

if TYPE_CHECKING:
    from mule.generate.request import Engine, Event

RESULTS = ROOT / "bench" / "results" / "serve.json"
PAGE = docs.settings.DOCS / docs.PERFORMANCE_PAGE

WAYS = {
    "mule-bf16": Way("**Mule**, bf16", "serve.py", None, "one"),
    "mule-fp32": Way("**Mule**, fp32", "serve.py", None, "one"),
    "hf-bf16": Way("transformers, bf16", "serve_hf.py", "hf", "bf16"),
    "hf-fp32": Way("transformers, fp32", "serve_hf.py", "hf", "fp32"),
    "llamacpp": Way("llama.cpp, f16", "serve.py", None, "one"),
}
WEIGHT_BYTES = {"mule-bf16": 2, "mule-fp32": 4, "hf-bf16": 2, "hf-fp32": 4, "llamacpp": 2}
# (what, whose, beside whom, at least): the targets of this benchmark.
TARGETS = (
    ("decode 1", "mule-bf16", "hf-bf16", 1.6),
    ("decode 1", "mule-bf16", "llamacpp", 0.9),
    ("mixed", "mule-bf16", "hf-bf16", 4.0),
    ("prefill", "mule-bf16", "llamacpp", 1.0),
)


def run(words: list[str], rounds: int = 1) -> None:
    """Measure the ways in turn; a finished round is kept at once."""
    ways = _known(words)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        job = llama_job(Path(name))
        make_inputs(job)
        for number in range(rounds):
            found.append(_round(job, ways, f"{number + 1}/{rounds}"))
            fsio.write_json(RESULTS, _described(job, found))
            report()


def smoke(words: list[str]) -> dict[str, Any]:
    """The ways once at a tiny shape; the figures mean nothing."""
    with tempfile.TemporaryDirectory() as name:
        job = tiny_job(Path(name))
        make_inputs(job)
        found = _described(job, [_round(job, _known(words), "tiny")])
    print(table_text(found))
    return found


def report() -> None:
    """Write the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    fsio.write_text(PAGE, docs.with_generated(page, table(), "serve"))


def _known(words: list[str]) -> list[str]:
    if unknown := [word for word in words if word not in WAYS]:
        raise UserError(f"there is no way called `{unknown[0]}`", f"some of {', '.join(WAYS)}")
    return [name for name in WAYS if not words or name in words]


# ---------------------------------------------------------------- the job and its inputs


def llama_job(folder: Path) -> ServeJob:
    """The 126 M shape."""
    return ServeJob(
        folder=str(folder / "model"),
        gguf=str(folder / "model-F16.gguf"),
        vocab_size=32_768,
        hidden_size=768,
        num_layers=16,
        num_heads=12,
        num_kv_heads=4,
        intermediate_size=2048,
        row_length=1024,
        threads=THREADS,
        prefill_tokens=512,
        prefills=2,
        batches=((1, 40), (4, 32), (16, 24)),
        mixed_rows=16,
        mixed_prompt=(8, 128),
        mixed_answer=(8, 64),
    )


def tiny_job(folder: Path) -> ServeJob:
    """The same in small; llama.cpp needs rows of whole blocks."""
    return replace(
        llama_job(folder),
        vocab_size=600,
        hidden_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=256,
        row_length=256,
        threads=1,
        prefill_tokens=32,
        prefills=1,
        batches=((1, 12), (3, 12)),
        mixed_rows=3,
        mixed_prompt=(4, 12),
        mixed_answer=(4, 12),
    )


def make_inputs(job: ServeJob) -> None:
    """The folder with its tokenizer, and the same weights as an f16 GGUF."""
    import torch

    from mule.export.gguf import write_gguf
    from mule.models.decoder import empty_decoder
    from mule.models.folder import model_state, save_model

    tokenizer = _tokenizer(job.vocab_size)
    model = empty_decoder(config_of(job), torch.float32)
    model.init_weights(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(3)  # else a tied head answers each token with itself
    with fsio.atomic_folder(Path(job.folder)) as out:
        tokenizer.save(out)
        save_model(model_state(model), model.config, out, extra={"eos_token_id": tokenizer.eos_id})
    write_gguf(job.folder, job.gguf, "f16")


def _tokenizer(vocab_size: int) -> Any:
    """One of exactly this size, from random words: rows that stand for nothing would not be drawn."""
    import random

    from mule.tokenizer import Tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(2 * vocab_size)]
    tokenizer = Tokenizer.train([" ".join(words)] * 2, vocab_size)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, not {vocab_size}", "use more words"
        )
    return tokenizer


# ---------------------------------------------------------------- one way


def _round(job: ServeJob, names: list[str], label: str) -> dict[str, Any]:
    """The ways once, one after the other, and the bandwidth before and after them."""
    found: dict[str, Any] = {"bandwidths": [_bandwidth(job)]}
    for name in names:
        started_at = time.perf_counter()
        own = replace(job, way=name)
        found[name] = one_way(WAYS[name], own, Path(job.folder).parent / "compiled")
        found[name]["process_s"] = time.perf_counter() - started_at
        shown = {key: value for key, value in found[name].items() if key != "ids"}
        print(f"{label} {name}: {json.dumps(shown)}", flush=True)
    found["bandwidths"].append(_bandwidth(job))
    return found


def mule_figures(job: ServeJob) -> dict[str, Any]:
    """The one of Mule's engines that the job names, in this process."""
    import importlib.metadata

    import mule

    kind, _, dtype_name = job.way.partition("-")
    engine = torch_engine(job, dtype_name) if kind == "mule" else llamacpp_engine(job)
    try:
        found = figures(job, generate_with(engine))
    finally:
        engine.close()
    package = "torch" if kind == "mule" else "xllamacpp"
    version = {package: importlib.metadata.version(package), "mule": mule.__version__}
    return {**found, "versions": version}


def torch_engine(job: ServeJob, dtype_name: str) -> Engine:
    """Ours, with the weights as they are computed with."""
    import torch

    from mule.generate.batching import BatchEngine
    from mule.models.folder import load_model
    from mule.tokenizer import Tokenizer

    torch.set_num_threads(job.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]
    model = load_model(job.folder, dtype=dtype).eval()
    tokenizer = Tokenizer.load(job.folder)
    context = job.row_length
    return BatchEngine(model, tokenizer, chat=False, max_rows=16, context_tokens=context)


def llamacpp_engine(job: ServeJob) -> Engine:
    """llama.cpp in its child process."""
    from mule.generate.llamacpp_batching import LlamaCppEngine

    return LlamaCppEngine(job.gguf, context_tokens=job.row_length, threads=job.threads)


def generate_with(engine: Engine) -> Generate:
    """All prompts handed to the engine at once."""
    import queue

    from mule.generate.request import Ended, Request
    from mule.generate.sampler import Sampling

    def generate(prompts: list[list[int]], lengths: list[int]) -> Answers:
        events: queue.SimpleQueue[tuple[int, float, Event]] = queue.SimpleQueue()

        def deliver(row: int) -> Any:
            return lambda event: events.put((row, time.perf_counter(), event))

        answers = Answers(time.perf_counter(), [[] for _ in prompts], [[] for _ in prompts])
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            request = Request(tuple(prompt), length, Sampling(), stop_ids=frozenset())
            engine.submit(request, deliver(row))
        num_running = len(prompts)
        while num_running:
            row, at, event = events.get()
            if not isinstance(event, Ended):
                answers.ids[row].append(event.id)
                answers.times[row].append(at)
                continue
            num_running -= 1
            if event.reason != "length":
                raise UserError(
                    f"an answer ended with {event.reason}: {event.error}", "run it once more"
                )
        return answers

    return generate


def _bandwidth(job: ServeJob) -> float:
    """Bytes a second that all threads read, in a process of its own."""
    words = [sys.executable, str(Path(__file__).resolve()), "bandwidth", str(job.threads)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------- the table


def _described(job: ServeJob, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds with what they are computed from; no path of this machine."""
    from mule.models import cost

    return {
        "bench": "serve",
        "command": "python bench/serve.py run",
        "date": time.strftime("%Y-%m-%d"),
        "job": {key: v for key, v in asdict(job).items() if key not in ("folder", "gguf", "way")},
        "params": cost.total_params(config_of(job)),
        "rounds": rounds,
        "machine": machine.describe(),
    }


def table(results: Path = RESULTS) -> str:
    """The table of docs/performance.md, and what it says beside the targets."""
    if not results.is_file():
        return (
            "Not measured yet: `python bench/train.py setup`, then `python bench/serve.py run`.\n"
        )
    return table_text(fsio.read_json(results))


def table_text(found: dict[str, Any]) -> str:
    """The medians over the rounds, in tokens a second."""
    rounds, job = found["rounds"], found["job"]
    names = [name for name in WAYS if name in rounds[0]]
    counts = [str(rows) for rows, _ in job["batches"]]
    head = ["way", *(f"decode, {count} at once" for count in counts), "of the limit at 1"]
    head += [f"prefill of {job['prefill_tokens']}", f"{job['mixed_rows']} of mixed lengths"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for name in names:
        cells = [f"{_median(rounds, name, f'decode {count}'):,.1f}" for count in counts]
        share = statistics.median(_share_of_limit(found, r, name) for r in rounds)
        rest = [f"{_median(rounds, name, what):,.0f}" for what in ("prefill", "mixed")]
        lines.append(f"| {' | '.join([WAYS[name].title, *cells, f'{share:.0%}', *rest])} |")
    return "\n".join([*lines, "", *_targets(rounds), _greedy(rounds), _note(found)]) + "\n"


def _figure(found: dict[str, Any], what: str) -> float:
    kind, _, count = what.partition(" ")
    return found[kind][count] if count else found[kind]


def _median(rounds: list[dict[str, Any]], name: str, what: str) -> float:
    return statistics.median(_figure(r[name], what) for r in rounds)


def _share_of_limit(found: dict[str, Any], one: dict[str, Any], name: str) -> float:
    """Decoding at batch 1 beside the rate at which memory gives all weights once a token."""
    limit = max(one["bandwidths"]) / (found["params"] * WEIGHT_BYTES[name])
    return _figure(one[name], "decode 1") / limit


def _targets(rounds: list[dict[str, Any]]) -> list[str]:
    """One line a target that could be measured; ratios are taken within a round."""
    lines = []
    for what, mine, theirs, least in TARGETS:
        if not {mine, theirs} <= rounds[0].keys():
            continue
        ratio = statistics.median(_figure(r[mine], what) / _figure(r[theirs], what) for r in rounds)
        verdict = "met" if ratio >= least else "**missed**"
        place = {"decode 1": "decoding one answer", "mixed": "mixed lengths"}.get(what, what)
        lines.append(
            f"- {place}: {WAYS[mine].title} makes **{ratio:.2f} times** the tokens a second of "
            f"{WAYS[theirs].title}; wanted: {least:g} ({verdict})."
        )
    return lines


def _greedy(rounds: list[dict[str, Any]]) -> str:
    """Whether Mule and transformers say the same in fp32."""
    if not {"mule-fp32", "hf-fp32"} <= rounds[0].keys():
        return "- Greedy answers in fp32 were not compared."
    pairs = [
        (mine, theirs)
        for r in rounds
        for count, rows in r["mule-fp32"]["ids"].items()
        for mine, theirs in zip(rows, r["hf-fp32"]["ids"][count], strict=True)
    ]
    same = sum(mine == theirs for mine, theirs in pairs)
    varied = statistics.median(len(set(mine)) for mine, _ in pairs)
    return (
        f"- Greedy answers in fp32: {same} of {len(pairs)} are token for token those of transformers "
        f"(of {varied:g} different tokens at the median)."
    )


def _note(found: dict[str, Any]) -> str:
    job, first = found["job"], found["rounds"][0]
    names: dict[str, str] = {}
    for name in WAYS:
        names |= first.get(name, {}).get("versions", {})
    used = ", ".join(f"{package} {version}" for package, version in sorted(names.items()))
    best = max(b for r in found["rounds"] for b in r["bandwidths"])
    return (
        f"- {found['params'] / 1e6:.1f} M parameters; memory is read at {best / 1e9:.1f} GB/s. Mixed: "
        f"prompts of {job['mixed_prompt'][0]} to {job['mixed_prompt'][1]} tokens, answers of "
        f"{job['mixed_answer'][0]} to {job['mixed_answer'][1]}. Rounds: {len(found['rounds'])}. "
        f"{found['machine']['cpu']}, {job['threads']} threads, {found['date']}; {used}; "
        f"`{found['command']}`."
    )


def main(words: list[str]) -> None:
    command, *rest = words or ["run"]
    if command == "one":
        print(json.dumps(mule_figures(ServeJob(**json.loads(rest[0])))))
    elif command == "bandwidth":
        print(machine.read_bandwidth(threads=int(rest[0])))
    elif command == "run":
        names, numbers = split(rest)
        run(names, **numbers)
    elif command == "smoke":
        smoke(rest)
    else:
        {"report": report}[command]()


if __name__ == "__main__":
    main(sys.argv[1:])
