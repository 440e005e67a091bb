"""A first life on real text: 57 novels, Alpaca and GSM8K, 320 chats about pizza.

    python bench/first_life.py run      # every command of the page, an hour on two cores
    python bench/first_life.py report   # docs/results/first-life.md from what was measured

Each command goes through the command line, as a user would type it; its last line of JSON is kept
in bench/results/first-life.json. A stage that is finished is not repeated.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from mule import fsio, machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "first-life.json"
PAGE = ROOT / "docs" / "results" / "first-life.md"
PLOT = ROOT / "docs" / "results" / "first-life.svg"
STAGES = ("pretrain", "sft", "lora")
TYPES = "f16,bf16,q8_0,q6_k,q5_k_m,q4_k_m"
EXPORTS = "exports/first-life"
PROMPTS = {
    "pretrain": ["It was a dark and stormy night, and", "The old man looked at her and said,"],
    "sft": [
        "What is the capital of France?",
        "Give three tips for staying healthy.",
        "Tom has 3 apples and buys 4 more. How many apples does he have?",
        "Rewrite the sentence in the passive voice: The cat chased the mouse.",
    ],
    "lora": [
        "What is Hawaiian pizza?",
        "Who invented it?",
        "Should I put pineapple on my pizza?",
        "What is the capital of France?",
    ],
}


def run() -> None:
    """Run every stage that has no result yet."""
    results: dict[str, Any] = fsio.read_json(RESULTS) if RESULTS.is_file() else {}
    results.setdefault("machine", machine.describe())
    for stage in STAGES:
        recipe = f"recipes/first-life/{stage}.yaml"
        _keep(results, f"train {stage}", f"mule train {recipe} --resume")
        _keep(results, f"eval {stage}", f"mule eval runs/first-life-{stage}")
    _keep(results, "merge", "mule merge runs/first-life-lora --out exports/first-life/merged")
    _keep(results, "export", f"mule export {EXPORTS}/merged --types {TYPES} --out {EXPORTS}")
    _keep(results, "verify", f"mule verify {EXPORTS}")
    sources = {stage: f"runs/first-life-{stage}" for stage in STAGES}
    sources["q4_k_m"] = f"{EXPORTS}/first-life-Q4_K_M.gguf"
    for name, source in sources.items():
        for prompt in PROMPTS.get(name, PROMPTS["lora"]):
            options = "--temperature 0.7 --seed 1 --max-tokens 80"
            command = f"mule chat {source} --prompt {shlex.quote(prompt)} {options}"
            _keep(results, f"chat {name}: {prompt}", command)
    runs = " ".join(f"runs/first-life-{stage}" for stage in STAGES)
    _mule(f"mule runs plot {runs} --out {PLOT.relative_to(ROOT)}")


def report() -> None:
    """Write the page from the results."""
    results = fsio.read_json(RESULTS)
    fsio.write_text(PAGE, "\n\n".join(_sections(results)) + "\n")


def _keep(results: dict[str, Any], name: str, command: str) -> None:
    if name in results:
        return
    results[name] = {"command": command, "result": _mule(f"{command} --json")}
    fsio.write_json(RESULTS, results)


def _mule(command: str) -> dict[str, Any]:
    """Run a command of Mule's; its JSON, when it was asked for."""
    print(f"$ {command}", flush=True)
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).with_name("mule"))
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise SystemExit(f"{command} ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1]) if "--json" in words else {}


# ---------------------------------------------------------------- the page


def _sections(results: dict[str, Any]) -> list[str]:
    found = results["machine"]
    flags = ", ".join(found["cpu_flags"]) or "no bf16 instructions"
    return [
        "# A first life: novels, instructions, pizza",
        "<!-- written by `python bench/first_life.py report` from bench/results/first-life.json -->",
        "One model of about 10M parameters, carried from raw text to a verified GGUF file by the "
        "recipes in `recipes/first-life/`, with the development data beside the checkout. It shows "
        "that the whole road works on real input and what such a small model can and cannot do; it "
        "is no useful assistant.",
        f"Machine: {found['cpu']}, {found['cores']} cores ({flags}), "
        f"{found['memory_bytes'] / 2**30:.0f} GiB, {found['system']}. Repeat it with "
        "`python bench/first_life.py run`.",
        "## Training",
        _training(results),
        "![Training and validation loss of the three stages](first-life.svg)",
        "## Held-out loss",
        _held_out(results),
        "## Merge, export, verify",
        _exports(results),
        "## Samples, good and bad",
        "Temperature 0.7, seed 1, at most 80 tokens; the first answer of each, none chosen.",
        *_samples(results),
        "## The commands",
        "```\n" + "\n".join(r["command"] for r in results.values() if "command" in r) + "\n```",
    ]


def _training(results: dict[str, Any]) -> str:
    rows = []
    for stage in STAGES:
        r = results[f"train {stage}"]["result"]
        rows.append(
            f"| {stage} | {r['steps']} | {r['tokens']:,} | {r['train_loss']:.3f} "
            f"| {r['val_loss']:.3f} | {r['tokens_per_second']:,.0f} | {r['share_of_peak']:.0%} "
            f"| {r['peak_memory_bytes'] / 2**30:.2f} GiB |"
        )
    head = "| stage | updates | tokens | train loss | val loss | tokens/s | of peak | memory |"
    note = (
        "Tokens/s leave the first update out. *Of peak* is useful FLOP/s over the best matmul of "
        "this machine (share of the measured peak; MFU is quoted against a GPU's published peak "
        "only). Train loss is the mean over the last 20 updates."
    )
    return "\n".join([head, "|---|--:|--:|--:|--:|--:|--:|--:|", *rows, "", note])


def _held_out(results: dict[str, Any]) -> str:
    rows = []
    for stage in STAGES:
        r = results[f"eval {stage}"]["result"]
        rows.append(
            f"| {stage} | {r['loss']:.3f} | {r['perplexity']:.2f} | {r['bits_per_byte']:.3f} "
            f"| {r['num_targets']:,} |"
        )
    head = "| stage | loss (nats) | perplexity | bits per byte | target tokens |"
    note = "Each on its own validation rows, all of them: the three are not comparable."
    return "\n".join([head, "|---|--:|--:|--:|--:|", *rows, "", note])


def _exports(results: dict[str, Any]) -> str:
    merge = results["merge"]["result"]
    rows = []
    for r in results["verify"]["result"]["files"]:
        equal = f"{r['num_greedy_equal']}/{r['num_prompts']}"
        rows.append(
            f"| {r['type']} | {r['size_bytes'] / 1e6:.1f} | {r['bits_per_weight']:.2f} "
            f"| {'yes' if r['tokens_equal'] else 'NO'} | {r['kl_mean']:.2e} | {r['kl_p99']:.2e} "
            f"| {r['top1']:.2%} | {r['ppl_reference']:.3f} | {r['ppl']:.3f} | {equal} "
            f"| {'yes' if r['stops'] else 'NO'} | {'ok' if r['ok'] else 'FAILED'} |"
        )
    head = (
        "| type | MB | bits/weight | same ids | KL mean | KL p99 | top-1 | ppl model | ppl file "
        "| same answers | stops | verdict |"
    )
    first = (
        f"The merge changed {merge['num_layers']} layers; its logits differ from the adapter's by "
        f"at most {merge['merged_against_adapter']:.1e}, from the base's by "
        f"{merge['merged_against_base']:.2f}. Each file ran in llama.cpp beside the merged model "
        "in fp32, on the run's held-out rows:"
    )
    return "\n".join([first, "", head, "|---|" + "--:|" * 11, *rows])


def _samples(results: dict[str, Any]) -> list[str]:
    shown = []
    for key, entry in results.items():
        if not key.startswith("chat "):
            continue
        name, prompt = key.removeprefix("chat ").split(": ", 1)
        text = " ".join(entry["result"]["text"].split())
        shown.append(f"**{name}** · {prompt}\n\n> {text or '(nothing)'}")
    return shown


if __name__ == "__main__":
    {"run": run, "report": report}[sys.argv[1] if len(sys.argv) > 1 else "run"]()
