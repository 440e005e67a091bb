"""Preparing data, beside the tokenizer alone and beside TRL.

    python bench/data.py setup    # TRL and datasets in an environment of their own: bench/peers/trl
    python bench/data.py run      # about ten minutes; bench/results/data.json
    python bench/data.py report   # the table of docs/data.md

Two inputs made of the development data: `text` (novels, web pages and stories, as rows of text)
and `chat` (Alpaca, GSM8K and Dolly as messages). Three ways with one tokenizer, in turn, each in a
fresh process, timed from the first byte read to the last row written, imports left out:

limit  `tokenizers` encode_batch on texts that are in memory already; nothing is read or written.
       Long texts whole, and cut into pieces as Mule cuts them: the faster one counts.
mule   `mule.data.prepare.prepare`: read, check, render, encode, pack, write, with its sums.
trl    datasets.load_dataset and SFTTrainer with packing, with one and with two processes: the
       faster one counts. Its model has one small layer and is not trained.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mule import fsio, machine

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "bench" / "results" / "data.json"
PAGE = ROOT / "docs" / "data.md"
PEER = ROOT / "bench" / "peers" / "trl"
PEER_PINS = ("trl==1.16.0", "datasets==5.2.0", "torch==2.13.0")
ROUNDS, ROW_LENGTH, VOCAB_SIZE = 5, 1024, 16_384
TEXTS = ("books-en", "c4", "tinystories")
CHATS = (
    *("alpaca/alpaca_en_demo.json", "alpaca/alpaca_data_cleaned_first500.json"),
    *("alpaca/instruction-data.json", "gsm8k/train.jsonl", "dolly/databricks-dolly-3k.jsonl"),
)
WAYS = {
    "text": ("limit whole", "limit pieces", "mule", "trl 1", "trl 2"),
    "chat": ("limit whole", "mule", "trl 1", "trl 2"),
}
_BEGIN, _END = "<!-- bench: begin -->", "<!-- bench: end -->"


def setup() -> None:
    """Make the peer's environment; its versions are pinned above and by constraints.txt."""
    subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
    pip = [str(PEER / "bin" / "python"), "-m", "pip", "install"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *PEER_PINS], check=True)


def run() -> None:
    """Time every way on both inputs, one after the other, round after round."""
    with tempfile.TemporaryDirectory(dir=ROOT / "bench" / "peers") as name:
        folder = Path(name)
        _make_inputs(folder)
        measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for kind, ways in WAYS.items():
            measured[kind] = {way: [] for way in ways}
            for number in range(ROUNDS):
                for way in ways:
                    measured[kind][way].append(_one(kind, way, folder))
                    print(f"{kind} {number + 1}/{ROUNDS} {way}: {measured[kind][way][-1]}")
        result = {
            "bench": "data",
            "command": "python bench/data.py run",
            "date": time.strftime("%Y-%m-%d"),
            "peer": _peer_versions(),
            "row_length": ROW_LENGTH,
            "vocab_size": VOCAB_SIZE,
            "inputs": {kind: (folder / f"{kind}.jsonl").stat().st_size for kind in WAYS},
            "measured": measured,
            "machine": machine.describe(),
        }
    fsio.write_json(RESULTS, result)
    report()


def report() -> None:
    """Write the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(_BEGIN)
    _, tail = rest.split(_END)
    fsio.write_text(PAGE, f"{head}{_BEGIN}\n{_table(fsio.read_json(RESULTS))}\n{_END}{tail}")


# ---------------------------------------------------------------- one way


def _one(kind: str, way: str, folder: Path) -> dict[str, Any]:
    """Seconds, tokens and peak memory of one way in a process of its own."""
    name, _, variant = way.partition(" ")
    python = PEER / "bin" / "python" if name == "trl" else Path(sys.executable)
    script = ROOT / "bench" / ("data_trl.py" if name == "trl" else "data.py")
    out = Path(tempfile.mkdtemp(dir=folder))
    words = [str(python), str(script), "one", kind, name, variant or "-", str(folder), str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home")}
    environment["TOKENIZERS_PARALLELISM"] = "true"
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    shutil.rmtree(out)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _time_here(kind: str, name: str, variant: str, folder: Path, out: Path) -> dict[str, Any]:
    from mule.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer")
    file = folder / f"{kind}.jsonl"
    if name == "mule":
        return _time_mule(file, tokenizer, out)
    texts = list(_rendered(file, tokenizer))
    if variant == "pieces":
        texts = [piece for text in texts for piece in tokenizer.cut(text)]
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    started = time.perf_counter()
    encoded = backend.encode_batch(texts, add_special_tokens=False)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": sum(len(e) for e in encoded)}


def _time_mule(file: Path, tokenizer: Any, out: Path) -> dict[str, Any]:
    from mule.data.prepare import RowSettings, prepare
    from mule.data.sources.options import ReadOptions

    settings = RowSettings(ReadOptions(), ROW_LENGTH, True, False, "drop")
    tokenizer.encode("a")  # the first call builds what later ones share
    started = time.perf_counter()
    shards = prepare([file], tokenizer, settings, out_dir=out)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens": shards.num_tokens,
        "fill": shards.fill,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


# ---------------------------------------------------------------- inputs


def _make_inputs(folder: Path) -> None:
    """text.jsonl, chat.jsonl and the tokenizer that all ways share."""
    from mule.data.sources import Conversation, Document, expand, read
    from mule.tokenizer import Tokenizer

    for kind, names in (("text", TEXTS), ("chat", CHATS)):
        with open(folder / f"{kind}.jsonl", "w", encoding="utf-8") as file:
            for item in read(expand([SHARED / name for name in names])):
                if isinstance(item, Document):
                    row: dict[str, Any] = {"text": item.text}
                elif isinstance(item, Conversation):
                    row = {"messages": item.as_dicts()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    texts = [item.text for item in read([folder / "text.jsonl"]) if isinstance(item, Document)]
    Tokenizer.train((text[:200_000] for text in texts), VOCAB_SIZE).save(folder / "tokenizer")


def _rendered(file: Path, tokenizer: Any) -> Iterator[str]:
    """The texts that end up in the rows."""
    from mule.data.sources import Conversation, Document, read

    for item in read([file]):
        if isinstance(item, Document):
            yield item.text
        elif isinstance(item, Conversation):
            yield tokenizer.render_chat(item.as_dicts(), add_generation_prompt=False)


def _peer_versions() -> dict[str, str]:
    code = "import importlib.metadata as m; print(*(m.version(n) for n in ('trl', 'datasets')))"
    done = subprocess.run(
        [str(PEER / "bin" / "python"), "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(zip(("trl", "datasets"), done.stdout.split(), strict=True))


# ---------------------------------------------------------------- the table


def _table(result: dict[str, Any]) -> str:
    head = (
        "| input | way | seconds: fastest (median) | tokens/s | of the limit | Mule is faster by |"
    )
    rows = [head, "|---|---|--:|--:|--:|--:|"]
    for kind, ways in result["measured"].items():
        # Other work on the machine can only slow a run down, so the fastest of each counts.
        best = {way: min(r["seconds"] for r in runs) for way, runs in ways.items()}
        limit = min(best[way] for way in ways if way.startswith("limit"))
        for way, runs in ways.items():
            median = statistics.median(r["seconds"] for r in runs)
            rows.append(
                f"| {kind}, {result['inputs'][kind] / 1e6:.1f} MB | {way} "
                f"| {best[way]:.2f} ({median:.2f}) | {runs[0]['tokens'] / best[way]:,.0f} "
                f"| {limit / best[way]:.0%} | {best[way] / best['mule']:.1f}x |"
            )
    fill = result["measured"]["chat"]["mule"][0]["fill"]
    found, peer = result["machine"], result["peer"]
    text = (
        f"{found['cpu']}, {found['cores']} cores, {result['date']}; TRL {peer['trl']}, datasets "
        f"{peer['datasets']}; `{result['command']}`, in turn, "
        f"{len(result['measured']['text']['mule'])} rounds. Packed rows of {result['row_length']:,} "
        f"tokens; the chat rows are {fill:.2%} full."
    )
    return "\n".join([*rows, "", text])


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        _, _, kind, name, variant, folder, out = sys.argv
        print(json.dumps(_time_here(kind, name, variant, Path(folder), Path(out))))
    else:
        {"setup": setup, "run": run, "report": report}[sys.argv[1] if sys.argv[1:] else "run"]()
