"""The demo with three seeds, through the command line.

python bench/demo.py run 0 1 2   # about 5 minutes each on two cores with bf16 instructions
python bench/demo.py report      # what README.md, README.fr.md and docs/demo.md show of it
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mule import fsio, machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
_ANSWERS = {  # page -> what stands above the answers of each stage
    "README.md": "*What is the capital of France?* at every stage of `mule demo`, in {seconds} seconds "
    "on {cpu}, {cores} cores:",
    "README.fr.md": "*What is the capital of France?* à chaque étape de `mule demo`, en {seconds} "
    "secondes sur {cpu}, {cores} cœurs\u00a0:",
}


def run(seeds: list[int]) -> None:
    """Run the demo for each seed in a folder of its own, and keep what it printed."""
    mule = str(Path(sys.executable).with_name("mule"))
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix="mule-demo-"))
        command = ["demo", "--seed", str(seed), "--json"]
        started_at = time.perf_counter()
        # As on a fresh machine: nothing compiled is found in the user's cache.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
        done = subprocess.run(
            [mule, *command], cwd=folder, stdout=subprocess.PIPE, text=True, env=environment
        )
        if done.returncode:
            raise SystemExit(f"seed {seed}: the demo ended with {done.returncode} in {folder}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        fsio.write_json(
            RESULTS / f"demo-seed-{seed}.json",
            {
                "command": "mule " + " ".join(command),
                "machine": machine.describe(),
                "total_seconds": round(time.perf_counter() - started_at, 1),
                "result": result,
            },
        )
        shutil.rmtree(folder)


def report() -> None:
    """Write the tables between their marks."""
    found = [fsio.read_json(file) for file in sorted(RESULTS.glob("demo-seed-*.json"))]
    if not found:
        raise SystemExit("no results: python bench/demo.py run 0 1 2")
    first = found[0]
    where = f"{first['machine']['cpu']}, {first['machine']['cores']} cores"
    shown = "\n".join(f"{s['stage']:12} {s['france']}" for s in first["result"]["stages"])
    for page, words in _ANSWERS.items():
        seconds, cores = round(first["total_seconds"]), first["machine"]["cores"]
        said = words.format(seconds=seconds, cpu=first["machine"]["cpu"], cores=cores)
        _replace(ROOT / page, "demo", f"{said}\n\n```\n{shown}\n```")
    seeds = [
        f"### Seed {each['result']['seed']}: {each['total_seconds']:.0f} s in all\n\n{_table(each)}"
        for each in found
    ]
    note = f"Measured on {where} with `python bench/demo.py run 0 1 2`."
    _replace(ROOT / "docs" / "demo.md", "seeds", "\n\n".join([note, *seeds]))


def _table(found: dict[str, Any]) -> str:
    head = (
        "| stage | capitals, seen wordings | unseen wordings | in persona | differs from the "
        "adapter | size | perplexity | seconds |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    rows = []
    for stage in found["result"]["stages"]:
        rows.append(
            f"| {stage['stage']} | {stage['exact_match']:.0%} | {stage['exact_match_unseen']:.0%} "
            f"| {_share(stage['persona'])} | {_differs(stage)} | {_size(stage)} | {_ppl(stage)} "
            f"| {stage['seconds']:.0f} |"
        )
    return "\n".join([head, *rows])


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _differs(stage: dict[str, Any]) -> str:
    if "different_answers" not in stage:
        return ""
    count = stage["different_answers"]
    return "no answer" if not count else f"{count}, margin {stage['widest_margin']:.1e}"


def _size(stage: dict[str, Any]) -> str:
    return f"{stage['size_bytes'] / 1e6:.1f} MB" if "size_bytes" in stage else ""


def _ppl(stage: dict[str, Any]) -> str:
    return f"{stage['ppl']:.3f} (model {stage['ppl_reference']:.3f})" if "ppl" in stage else ""


def _replace(file: Path, mark: str, body: str) -> None:
    """Put `body` between `<!-- mark:begin -->` and `<!-- mark:end -->`."""
    text = file.read_text(encoding="utf-8")
    pattern = rf"(<!-- {mark}:begin -->\n).*?(<!-- {mark}:end -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)
    assert count == 1, f"{file} has no place for {mark}"
    fsio.write_text(file, text)


if __name__ == "__main__":
    action, *seeds = sys.argv[1:] or ["report"]
    run([int(seed) for seed in seeds] or [0, 1, 2]) if action == "run" else report()
