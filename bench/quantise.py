"""Quantising beside llama.cpp's own quantiser: the same weights, types and threads, one after the other.

    python bench/quantise.py setup    # a native build of llama.cpp, by npm: bench/peers/llama.cpp
    python bench/quantise.py smoke    # every way once at a tiny shape; keeps nothing
    python bench/quantise.py run      # three rounds; for less: run q4_k_m rounds=1
    python bench/quantise.py report   # the table of docs/performance.md

A Llama of 126M (hidden 768, 16 layers, a vocabulary of 32,768 tied to the head) with random weights in
f16 becomes q4_k_m, q8_0 and q6_k: by `llama_model_quantize` of the native build from an f16 GGUF file,
by Mule from the same file, and by Mule from the folder of safetensors. Each way runs in a process of its
own, in turn, on two cores with two threads. The time is that of the whole export: Mule's child process
starts in it, and what was written is read back and put on the disk for good (fsync), which
llama_model_quantize does not do. CPU seconds are those of all processes: other work on the machine
changes them little. `run` writes bench/results/quantise.json after each round.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train import PEERS, ROOT
from train_timing import split, versions

from mule import fsio, machine
from mule.commands import docs
from mule.errors import UserError

RESULTS = ROOT / "bench" / "results" / "quantise.json"
PAGE = docs.settings.DOCS / docs.PERFORMANCE_PAGE
TYPES = ("q4_k_m", "q8_0", "q6_k")
ROUNDS, THREADS = 3, 2
WAYS = {
    "native": "llama_model_quantize, from the f16 file",
    "file": "**Mule**, from the f16 file",
    "folder": "**Mule**, from safetensors",
}
PACKAGE, PACKAGE_VERSION = "@node-llama-cpp/linux-x64", "3.22.1"
LIBRARIES = PEERS / "llama.cpp" / "package" / "bins" / "linux-x64"
_SETUP = "python bench/quantise.py setup"


@dataclass(frozen=True)
class Shape:
    """A Llama with a tied head."""

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_layers: int = 16
    num_heads: int = 12
    num_kv_heads: int = 4
    vocab_size: int = 32_768


TINY = Shape(256, 512, 2, 4, 2, 1_024)


def setup() -> None:
    """Fetch the prebuilt libraries of llama.cpp that a package of npm carries."""
    folder = PEERS / "llama.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    packed = f"{PACKAGE}@{PACKAGE_VERSION}"
    subprocess.run(["npm", "pack", packed], check=True, cwd=folder)
    (archive,) = folder.glob("*.tgz")
    shutil.unpack_archive(archive, folder)
    archive.unlink()


def run(types: list[str], rounds: int = ROUNDS) -> None:
    """Measure the types, all ways in turn; a finished round is kept at once."""
    if unknown := [name for name in types if name not in TYPES]:
        raise UserError(
            f"there is no type called `{unknown[0]}` here", f"one of {', '.join(TYPES)}"
        )
    kept = fsio.read_json(RESULTS)["types"] if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "model", Shape())
        for type_name in types or TYPES:
            found: list[dict[str, Any]] = []
            for number in range(rounds):
                found.append(_round(folder, type_name, f"{type_name} {number + 1}/{rounds}"))
                kept[type_name] = _described(found)
                fsio.write_json(RESULTS, {"bench": "quantise", "types": kept})
                report()


def smoke(types: list[str]) -> dict[str, Any]:
    """Every way once at a tiny shape; the times mean nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "model", TINY)
        return {
            type_name: _described([_round(folder, type_name, f"{type_name} tiny")])
            for type_name in types or TYPES
        }


def report() -> None:
    """Write the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    fsio.write_text(PAGE, docs.with_generated(page, table(), "quantise"))


# ---------------------------------------------------------------- the model


def write_model(folder: Path, shape: Shape) -> Path:
    """A folder with random f16 weights, and beside it the same as an f16 GGUF file."""
    import torch

    from mule.export.gguf import write_gguf
    from mule.models.decoder import empty_decoder
    from mule.models.families import family
    from mule.models.folder import model_state, save_model
    from mule.tokenizer import Tokenizer

    folder.mkdir(parents=True)
    tokenizer = Tokenizer.train(["a few words are enough here"] * 50, 300)
    tokenizer.save(folder)
    raw = {"model_type": "llama", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
    raw |= {"tie_word_embeddings": True, "rope_theta": 10_000.0, "head_dim": 64}
    raw |= {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    raw |= {"num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads}
    raw |= {"num_key_value_heads": shape.num_kv_heads, "vocab_size": shape.vocab_size}
    config = family("llama").from_hf(raw)
    model = empty_decoder(config, torch.float32)
    model.init_weights(0)
    extra = {"eos_token_id": tokenizer.stop_ids[0]}
    save_model(model_state(model.half()), config, folder, extra=extra)
    write_gguf(folder, master_of(folder), "f16")
    return folder


def master_of(folder: Path) -> Path:
    return folder.with_name("master-F16.gguf")


# ---------------------------------------------------------------- one way


def _round(folder: Path, type_name: str, label: str) -> dict[str, Any]:
    """The ways once, one after the other; and whether Mule's tensors are the native build's."""
    if not LIBRARIES.is_dir():
        raise UserError(f"{LIBRARIES} is missing", f"fetch it: {_SETUP}")
    found: dict[str, Any] = {}
    for way in WAYS:
        words = [sys.executable, str(ROOT / "bench" / "quantise.py"), "one"]
        words += [way, str(folder), type_name]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            words, check=True, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}
        )
        found[way] = json.loads(done.stdout.splitlines()[-1])
        print(f"{label} {way}: {json.dumps(found[way])}", flush=True)
    native = _tensors(_out(folder, "native", type_name))
    for way in ("file", "folder"):
        own = _tensors(_out(folder, way, type_name))
        found[way]["identical_tensors"] = sum(own[name] == native[name] for name in native)
        found[way]["tensors"] = len(native)
    return found


def one(way: str, folder: Path, type_name: str) -> dict[str, Any]:
    """Quantise in this process (and Mule's child), once."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    quantise = _prepared(way, folder, type_name)
    for file in (master_of(folder), *folder.glob("*.safetensors")):
        file.read_bytes()  # it is in memory for every way
    cpu, start = _cpu_seconds(), time.perf_counter()
    version = quantise()
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "size_bytes": _out(folder, way, type_name).stat().st_size,
        "version": version,
    }


def _prepared(way: str, folder: Path, type_name: str) -> Any:
    """What is timed, its imports done."""
    out = _out(folder, way, type_name)
    if way == "native":
        from mule.export.mixtures import TYPES as MIXTURES
        from tools.golden_quants import Native

        native, file_type = Native(LIBRARIES), int(MIXTURES[type_name][1])

        def quantise() -> str:
            native.quantize(master_of(folder), out, file_type, THREADS)
            return f"{PACKAGE} {PACKAGE_VERSION}, {native.version}"

        return quantise
    from mule.export.from_gguf import write_from_gguf
    from mule.export.gguf import write_gguf

    def export() -> str:
        if way == "file":
            write_from_gguf(master_of(folder), out, type_name)
        else:
            write_gguf(folder, out, type_name)
        return f"xllamacpp {versions('xllamacpp')['xllamacpp']}"

    return export


def _out(folder: Path, way: str, type_name: str) -> Path:
    return folder.with_name(f"{way}-{type_name}.gguf")


def _cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def _tensors(file: Path) -> dict[str, tuple[str, bytes]]:
    from gguf import GGUFReader

    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(file).tensors}


# ---------------------------------------------------------------- the table


def _described(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds with what they are computed from; no path of this machine."""
    return {
        "command": "python bench/quantise.py run",
        "date": time.strftime("%Y-%m-%d"),
        "shape": asdict(Shape()),
        "threads": THREADS,
        "rounds": rounds,
        "machine": machine.describe(),
        "load": os.getloadavg()[0],
    }


def table(results: Path = RESULTS) -> str:
    """The table of docs/performance.md, and what was measured on what."""
    if not results.is_file():
        return f"Not measured yet: `{_SETUP}`, then `python bench/quantise.py run`.\n"
    head = "| type | way | seconds | speed beside it | CPU seconds | beside it | blocks |"
    lines, notes = [head, "|---|---|" + "--:|" * 5], []
    for type_name, found in fsio.read_json(results)["types"].items():
        rounds = found["rounds"]
        lines += [_line(type_name, way, rounds) for way in WAYS]
        cpu, load = found["machine"]["cpu"], found["load"]
        notes.append(
            f"- **{type_name}**: rounds: {len(rounds)}, {found['threads']} threads, {cpu}, "
            f"{found['date']}, load {load:.1f} at the end; {rounds[0]['native']['version']}; "
            f"{rounds[0]['file']['version']}; `{found['command']}`."
        )
    return "\n".join([*lines, "", *notes]) + "\n"


def _line(type_name: str, way: str, rounds: list[dict[str, Any]]) -> str:
    """One way's medians; shares are taken within a round."""
    own, native = ([found[name] for found in rounds] for name in (way, "native"))

    def share(field: str) -> str:
        return f"{statistics.median(b[field] / a[field] for a, b in zip(own, native)):.0%}"

    same = (
        "" if way == "native" else f"{own[0]['identical_tensors']} of {own[0]['tensors']} the same"
    )
    cells = (
        f"{statistics.median(found['seconds'] for found in own):.2f}",
        "" if way == "native" else f"**{share('seconds')}**",
        f"{statistics.median(found['cpu_seconds'] for found in own):.2f}",
        "" if way == "native" else share("cpu_seconds"),
        same,
    )
    return f"| {type_name} | {WAYS[way]} | {' | '.join(cells)} |"


def main(words: list[str]) -> None:
    command, *rest = words or ["run"]
    if command == "one":
        print(json.dumps(one(rest[0], Path(rest[1]), rest[2])))
    elif command in ("run", "smoke"):
        names, numbers = split(rest)
        {"run": run, "smoke": smoke}[command](names, **numbers)
    else:
        {"setup": setup, "report": report}[command]()


if __name__ == "__main__":
    main(sys.argv[1:])
