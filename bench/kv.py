"""What the cache of keys and values gains on the 125M shape, against the length of the text.

    python bench/kv.py run              # about ten minutes on two cores
    python bench/kv.py run minutes=30   # more of the slow rows, and more repetitions
    python bench/kv.py smoke            # the same at a tiny shape; keeps nothing
    python bench/kv.py report           # docs/results/kv-124m.md from what was measured

One shape with all, some and one heads of keys and values (MHA, GQA, MQA), random weights, one text
of 128 to 4,096 tokens, greedy. Each is decoded with the cache, and computed whole again for each
token, in the engine that `mule chat` takes. What the time does not allow is left out, and said.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

from train import ROOT
from train_timing import split

from mule import fsio, machine
from mule.commands import bench_kv, docs
from mule.lab.decode import measure_decode

RESULTS = ROOT / "bench" / "results" / "study-kv-124m.json"
PAGE = docs.settings.DOCS / "results" / "kv-124m.md"
COMMAND = "python bench/kv.py run"
ASKED = bench_kv.Asked("125m", context=(128, 256, 512, 1024, 2048, 4096), repetitions=3)
TINY = bench_kv.Asked("2m", context=(16, 32), repetitions=1, new_tokens=4, vocab_size=128)
# (attention, precision), the most important first.
MODELS = (("mha", "bf16"), ("gqa", "bf16"), ("mqa", "bf16"), ("gqa", "fp32"))
MINUTES = 10
NAMES = {"mha": "MHA", "gqa": "GQA", "mqa": "MQA"}
_HEAD = """\
# The KV cache on the 125M shape

<!-- written by `python bench/kv.py report` from bench/results/study-kv-124m.json -->"""
GATE_CONTEXT, GATE = 1024, 0.8  # of the predicted gain


def run(minutes: int = MINUTES) -> None:
    """Measure the models in turn; each is kept at once."""
    found = study(ASKED, minutes, keep=lambda found: fsio.write_json(RESULTS, found))
    fsio.write_json(RESULTS, found)
    report()


def smoke() -> dict[str, Any]:
    """The study at a tiny shape; the figures mean nothing."""
    found = study(TINY, 1)
    print(markdown(found))
    return found


def report() -> None:
    """Write the page."""
    if RESULTS.is_file():
        fsio.write_text(PAGE, markdown(fsio.read_json(RESULTS)))
    else:
        fsio.write_text(PAGE, f"{_HEAD}\n\nNot measured yet: `{COMMAND}`.\n")


def study(asked: bench_kv.Asked, minutes: int, keep: Any = lambda found: None) -> dict[str, Any]:
    """What `measure_decode` gives for each model, within so many minutes in all."""
    import torch

    import mule

    deadline = time.perf_counter() + 60 * minutes
    found: dict[str, Any] = {
        "bench": "kv-124m",
        "command": COMMAND,
        "date": time.strftime("%Y-%m-%d"),
        "mule": mule.__version__,
        "torch": torch.__version__,
        "minutes": minutes,
        "machine": machine.describe(),
        "asked": dataclasses.asdict(asked),
        "models": [],
    }
    for number, (attention, precision) in enumerate(MODELS):
        config = bench_kv.shaped_config(asked, attention)
        model = bench_kv.shaped_model(config, precision)
        device = model.device.type
        bandwidth = max(
            [m["bandwidth_bytes_per_second"] for m in found["models"]]
            + [machine.read_bandwidth(device)]
        )
        measured = measure_decode(
            model,
            batches=asked.batch,
            contexts=asked.context,
            precision=precision,
            repetitions=asked.repetitions,
            new_tokens=asked.new_tokens,
            time_limit_s=max(1.0, deadline - time.perf_counter()) / (len(MODELS) - number),
            bandwidth=bandwidth,
        )
        found["models"].append({"attention": attention, **measured})
        print(f"{attention} {precision}: {measured['gains']}", flush=True)
        keep(found)
    return found


# ---------------------------------------------------------------- the page


def markdown(found: dict[str, Any]) -> str:
    """The page: the gain against context, the caches, and every figure."""
    models = found["models"]
    return (
        "\n".join(
            [
                _HEAD,
                "",
                _introduction(found),
                "",
                "## How many times faster",
                "",
                *_gain_table(models),
                "",
                *_gain_words(models),
                "",
                "## What the cache takes",
                "",
                *_bytes_table(models),
                "",
                *_bytes_words(models),
                "",
                "## Every row",
                "",
                *_rows_table(models),
                "",
                *_left_out(models),
            ]
        ).rstrip()
        + "\n"
    )


def _title(model: dict[str, Any]) -> str:
    return f"{NAMES[model['attention']]}, {model['precision']}"


def _introduction(found: dict[str, Any]) -> str:
    models, asked = found["models"], found["asked"]
    first = models[0]
    largest = max(model["max_error"] or 0.0 for model in models)
    texts = (
        "the same texts" if all(m["same_text"] is not False for m in models) else "**other texts**"
    )
    card, held = first["card"], found["machine"]
    has_bf16 = bool({"amx_bf16", "avx512_bf16", "bf16"} & set(held["cpu_flags"]))
    bf16 = ""
    if first["device"] == "cpu" and not has_bf16:
        bf16 = (
            " This processor has no bf16 arithmetic: with bf16 the weights and the cache are stored and "
            "read in 16 bits, and multiplied in fp32."
        )
    minutes = found["minutes"]
    command = found["command"] + (f" minutes={minutes}" if minutes != MINUTES else "")
    return (
        f"One text, greedy, random weights: {card['num_layers']} blocks, {card['num_heads']} query "
        f"heads, a vocabulary of {asked['vocab_size']:,}. The models differ in their heads of keys "
        f"and values alone. A row's last {asked['new_tokens']} tokens (fewer without the "
        f"cache, where one takes seconds) are drawn after the same text; without the cache the "
        f"whole text is computed again for each, by the same code ({first['engine']}, the engine of "
        f"`mule chat`). Both ways gave the same logits (they differ by at most {largest:.1g}) and "
        f"{texts}."
        f"{bf16}\n\n{held['cpu']}, {first['threads']} threads, memory read at "
        f"{max(m['bandwidth_bytes_per_second'] for m in found['models']) / 1e9:.1f} GB/s, "
        f"{found['date']}, torch {found['torch']}; `{command}`, at most {minutes} minutes. A "
        f"single shape and length: `mule bench kv 125m --attention mha,gqa --context 1024`."
    )


def _contexts(models: list[dict[str, Any]]) -> list[int]:
    return sorted({row["context"] for model in models for row in model["rows"]})


def _gain_table(models: list[dict[str, Any]]) -> list[str]:
    contexts = _contexts(models)
    lines = [
        f"| tokens of text | {' | '.join(f'{context:,}' for context in contexts)} |",
        "|---" + "|--:" * len(contexts) + "|",
    ]
    for model in models:
        gains = {gain["context"]: gain for gain in model["gains"]}
        cells = [f"{gains[c]['gain']:.1f}" if c in gains else "-" for c in contexts]
        lines.append(f"| {_title(model)}: gain | {' | '.join(cells)} |")
        cells = [f"{gains[c]['share']:.0%}" if c in gains else "-" for c in contexts]
        lines.append(f"| of the prediction | {' | '.join(cells)} |")
    return lines


def _gain_words(models: list[dict[str, Any]]) -> list[str]:
    lines = [
        "The prediction takes two measured rates: without the cache a token takes the prefill of its "
        "text; with it, the longer of reading the weights and the cache once at the memory's speed, and "
        "of one token's arithmetic at the prefill's rate.",
        "",
    ]
    for model in models:
        for gain in model["gains"]:
            if gain["context"] == GATE_CONTEXT:
                verdict = "met" if gain["share"] >= GATE else "**missed**"
                lines.append(
                    f"- {_title(model)} at {GATE_CONTEXT:,} tokens: {gain['gain']:.1f} times, predicted "
                    f"{gain['predicted']:.1f}, {gain['share']:.0%}; wanted: {GATE:.0%} ({verdict})."
                )
        speeds = [row for row in model["rows"] if row["cached"]]
        plain = [row for row in model["rows"] if not row["cached"]]
        if len(speeds) > 1 and len(plain) > 1:
            lines.append(
                f"- {_title(model)}: with the cache {_span(speeds)}; without, {_span(plain)}."
            )
    return lines


def _span(rows: list[dict[str, Any]]) -> str:
    first, last = rows[0], rows[-1]
    return (
        f"{first['decode_tokens_per_second']:.3g} tokens a second at {first['context']:,} and "
        f"{last['decode_tokens_per_second']:.3g} at {last['context']:,}"
    )


def _bytes_table(models: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | heads of keys and values | a token | the longest text, measured | by the formula |",
        "|---|--:|--:|--:|--:|",
    ]
    for model in models:
        card = model["card"]
        row = max((r for r in model["rows"] if r["cached"]), key=lambda r: r["context"])
        lines.append(
            f"| {_title(model)} | {card['num_kv_heads']} of {card['num_heads']} "
            f"| {card['kv_bytes_per_token'] / 1024:.3g} KiB "
            f"| {row['cache_bytes'] / 2**20:.4g} MiB of {row['cache_tokens']:,} tokens "
            f"| {row['cache_formula_bytes'] / 2**20:.4g} MiB |"
        )
    return lines


def _bytes_words(models: list[dict[str, Any]]) -> list[str]:
    """Of the caches in one precision: as the heads."""
    sizes = {m["attention"]: m["card"] for m in models if m["precision"] == "bf16"}
    if not {"mha", "gqa"} <= sizes.keys():
        return []
    mha, gqa = sizes["mha"], sizes["gqa"]
    share = gqa["kv_bytes_per_token"] / mha["kv_bytes_per_token"]
    return [
        f"GQA's cache takes {share:.0%} of MHA's: {gqa['num_kv_heads']} of {mha['num_kv_heads']} heads. "
        "The formula: 2 x layers that attend x heads of keys and values x channels of a head x bytes "
        "of a value, for each token that there is room for (whole blocks of 64)."
    ]


def _rows_table(models: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | tokens of text | cache | tokens/s | ± | ms a token | repetitions x tokens "
        "| of the bandwidth | first token, s | prefill, tokens/s |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for model in models:
        for row in model["rows"]:
            share = f"{row['share_of_bandwidth']:.0%}" if row["cached"] else ""
            lines.append(
                f"| {_title(model)} | {row['context']:,} | {'yes' if row['cached'] else 'no'} "
                f"| {row['decode_tokens_per_second']:.3g} | {row['decode_std']:.2g} "
                f"| {1e3 * row['tpot_s']:.4g} | {row['repetitions']} x {row['new_tokens']} "
                f"| {share} | {row['time_to_first_token_s']:.3g} "
                f"| {row['prefill_tokens_per_second']:,.0f} |"
            )
    return lines


def _left_out(models: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"- {_title(model)}, {row['context']:,} tokens, "
        f"{'with' if row['cached'] else 'without'} the cache: {row['why']}."
        for model in models
        for row in model["not_measured"]
    ]
    return ["Not measured:", "", *lines] if lines else ["Every row was measured."]


def main(words: list[str]) -> None:
    command, *rest = words or ["run"]
    if command == "run":
        _, numbers = split(rest)
        run(**numbers)
    else:
        {"smoke": smoke, "report": report}[command]()


if __name__ == "__main__":
    main(sys.argv[1:])
