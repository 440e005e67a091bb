"""The runs that `bench/forecast.py train` adds: small models, trained in seconds, kept in a cache.

Each group is one data set and one shape, trained for a length and for twice that; fine-tunes also
on half of their data and on all of it. So there is for each of them a run with twice as much.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.doctor_cases import nested, write_rows
from bench.doctor_data import ATLAS_CHATS, ATLAS_TEXT, Folder
from mule import fsio

CACHE = Path.home() / ".cache" / "mule" / "bench" / "forecast"
SPEC = "spec.json"  # beside a run's folder, written last
_NUM_VALID = 60
_NOT_KEPT = ("checkpoint-*", "average", "start", "tokenizer", "probe.json")


@dataclass(frozen=True)
class Spec:
    """One run: `half` of the data or all of it, once or `twice` the updates."""

    group: str
    data: str
    num_rows: int
    recipe: dict[str, Any] = field(hash=False)
    base: str | None = None
    twice: bool = False
    half: bool = False

    @property
    def name(self) -> str:
        words = [self.group, "long" if self.twice else "short", *(["half"] if self.half else [])]
        return "-".join(words)

    @property
    def steps(self) -> int:
        return self.recipe["train.steps"] * (2 if self.twice else 1)

    @property
    def key(self) -> str:
        """Of all that decides what is learned."""
        return fsio.sha256_json([self.name, self.num_rows, self.filled(0)])

    def is_done(self, cache: Path) -> bool:
        """Whether the cache has it, trained as it is now."""
        file = cache / self.name / SPEC
        return file.is_file() and fsio.read_json(file)["key"] == self.key

    def filled(self, seed: int) -> dict[str, Any]:
        """The recipe as it is trained."""
        steps = self.steps
        base = {"model.path": f"../{self.base}/runs/{self.base}"} if self.base else {}
        return _COMMON | self.recipe | base | {
            "train.steps": steps,
            "train.seed": seed,
            "evaluate.every_steps": max(1, steps // 16),
            "checkpoint.every_steps": steps,
        }  # fmt: skip


_COMMON: dict[str, Any] = {
    "data.train": ["train.jsonl"],
    "data.valid": ["valid.jsonl"],
    "train.precision": "fp32",
    "train.compile": False,
    "train.threads": 1,
    "evaluate.max_rows": 16,
}


def _text(
    shape: tuple[str, int, int, int],
    vocab_size: int,
    rows: tuple[int, int],
    rate: float,
    steps: int,
) -> dict[str, Any]:
    family, hidden, layers, heads = shape
    return {
        "model.family": family,
        "model.hidden_size": hidden,
        "model.num_layers": layers,
        "model.num_heads": heads,
        "model.num_kv_heads": heads // 2,
        "model.intermediate_size": 2 * hidden + 32,
        "model.max_position_embeddings": 256,
        "tokenizer.vocab_size": vocab_size,
        "data.max_seq_length": rows[1],
        "train.step_rows": rows[0],
        "train.steps": steps,
        "optim.learning_rate": rate,
        "optim.warmup_steps": max(5, steps // 20),
    }


_WSD = {"optim.schedule": "wsd"}
_LINEAR = {"optim.schedule": "linear"}
_FLAT = {"optim.schedule": "constant"}
_FLOOR = {"optim.min_learning_rate": 8e-4}
_MUON = {"optim.kind": "muon"}
# group -> (data, rows of it, recipe); few rows are read several times over
_TEXTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "stories-qwen3": ("stories", 300, _text(("qwen3", 48, 2, 4), 512, (4, 48), 8e-3, 110)),
    "web-qwen3": ("web", 300, _text(("qwen3", 48, 1, 4), 512, (4, 64), 6e-3, 100) | _LINEAR),
    "novels-qwen3": ("novels", 300, _text(("qwen3", 40, 2, 4), 448, (6, 32), 8e-3, 120)),
    "wiki-qwen3": ("wiki", 300, _text(("qwen3", 32, 2, 4), 512, (4, 48), 8e-3, 90) | _FLOOR),
    "stories-llama": ("stories", 300, _text(("llama", 32, 3, 4), 384, (4, 48), 6e-3, 100) | _WSD),
    "wiki-llama": ("wiki", 300, _text(("llama", 40, 1, 4), 448, (6, 32), 1e-2, 110) | _FLAT),
    "web-llama": ("web", 300, _text(("llama", 32, 2, 4), 384, (8, 24), 1e-2, 90)),
    "novels-muon": ("novels", 300, _text(("qwen3", 32, 1, 4), 448, (4, 48), 5e-3, 80) | _MUON),
    "romans-qwen3": ("romans", 300, _text(("qwen3", 32, 2, 4), 384, (4, 48), 1e-2, 90) | _WSD),
    "romans-llama": ("romans", 300, _text(("llama", 48, 1, 4), 512, (4, 40), 5e-3, 120) | _LINEAR),
    "plays-qwen3": ("shakespeare", 300, _text(("qwen3", 32, 2, 4), 384, (5, 48), 8e-3, 100)),
    "plays-few": ("shakespeare", 30, _text(("qwen3", 40, 1, 4), 384, (6, 32), 8e-3, 100)),
    "atlas-llama": (ATLAS_TEXT, 200, _text(("llama", 40, 2, 4), 384, (4, 48), 6e-3, 80) | _WSD),
    "web-few": ("web", 30, _text(("qwen3", 32, 1, 4), 384, (4, 48), 8e-3, 90) | _LINEAR),
}
_LORA: dict[str, Any] = {
    "adapter.kind": "lora",
    "adapter.lora.r": 8,
    "adapter.lora.alpha": 16,
    "adapter.trunk_cache": "off",
}


def _chats(rate: float, steps: int) -> dict[str, Any]:
    return {
        "train.steps": steps,
        "train.step_rows": 3,
        "data.max_seq_length": 128,
        "optim.learning_rate": rate,
        "optim.warmup_steps": max(4, steps // 20),
    }


_LONG = {"data.max_seq_length": 256, "train.step_rows": 2}
# group -> (base, data, rows of it, recipe)
_FINE_TUNES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "alpaca-full": ("stories-qwen3-long", "alpaca", 160, _chats(3e-3, 80)),
    "dolly-full": ("novels-qwen3-long", "dolly", 120, _chats(2e-3, 70) | _LINEAR),
    "gsm8k-full": ("web-qwen3-long", "gsm8k", 80, _chats(4e-3, 70) | _LONG),
    "pairs-full": ("wiki-qwen3-long", "pairs", 80, _chats(3e-3, 60) | _FLAT),
    "instructions-lora": ("stories-qwen3-long", "instructions", 120, _chats(8e-3, 70) | _LORA),
    "dolly-lora": ("wiki-qwen3-long", "dolly", 240, _chats(8e-3, 80) | _LORA | _WSD),
    "gsm8k-lora": ("novels-qwen3-long", "gsm8k", 60, _chats(1e-2, 70) | _LONG | _LORA),
    "alpaca-few": ("web-qwen3-long", "alpaca", 24, _chats(4e-3, 60)),
    "pairs-few": ("novels-qwen3-long", "pairs", 20, _chats(1e-2, 60) | _LORA),
    "atlas-lora": ("web-qwen3-long", ATLAS_CHATS, 100, _chats(6e-3, 60) | _LORA | _LINEAR),
}


def specs() -> list[Spec]:
    """Every run, bases before what is trained on them, and both kinds early."""

    def texts(twice: bool) -> list[Spec]:
        found = _TEXTS.items()
        return [Spec(group, *given, twice=twice) for group, given in found]

    def fine_tunes(twice: bool, half: bool) -> list[Spec]:
        return [
            Spec(group, data, count, recipe, base=base, twice=twice, half=half)
            for group, (base, data, count, recipe) in _FINE_TUNES.items()
        ]

    return [
        *texts(True),
        *fine_tunes(False, False),
        *texts(False),
        *fine_tunes(True, False),
        *fine_tunes(False, True),
        *fine_tunes(True, True),
    ]


def train_all(cache: Path, data: Folder) -> None:
    """Train what the cache lacks, one after the other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    import mule.commands.train
    import mule.train.loop  # noqa: F401

    wanted = [spec for spec in specs() if data.has(spec.data)]
    lacking = [spec for spec in wanted if not spec.is_done(cache)]
    print(f"{len(wanted) - len(lacking)} of {len(wanted)} are done already", flush=True)
    for place, spec in enumerate(lacking, start=1):
        started_at = time.perf_counter()
        child = multiprocessing.get_context("fork").Process(target=_train, args=(spec, cache, data))
        child.start()
        child.join()
        said = "FAILED, see output.log" if child.exitcode else ""
        seconds = time.perf_counter() - started_at
        print(f"{place}/{len(lacking)} {spec.name}: {seconds:.1f} s {said}", flush=True)


def _train(spec: Spec, cache: Path, data: Folder) -> None:
    """One run, in a process of its own."""
    from mule.commands import train

    folder = cache / spec.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_data(spec, folder, data)
    seed = random.Random(spec.name).randrange(1000)
    fsio.write_json(folder / "recipe.yaml", nested(spec.filled(seed)))
    os.chdir(folder)
    log = os.open(folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train.run(Path("recipe.yaml"), [], name=spec.name)
    if spec.name not in {base for base, *_ in _FINE_TUNES.values()}:
        for pattern in _NOT_KEPT:
            for path in (folder / "runs" / spec.name).glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder / "runs" / ".prepared", ignore_errors=True)
    about = {"key": spec.key, "group": spec.group, "data": spec.data}
    fsio.write_json(folder / SPEC, about | {"twice": spec.twice, "half": spec.half})


def _write_data(spec: Spec, folder: Path, data: Folder) -> None:
    """The same rows for validation in all runs of a group; half of the data is its first half."""
    rows = data.rows(spec.data, 0, spec.num_rows + _NUM_VALID)
    random.Random(f"{spec.group}:{spec.data}").shuffle(rows)
    valid, train = rows[:_NUM_VALID], rows[_NUM_VALID:]
    if spec.half:
        train = train[: len(train) // 2]
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "valid.jsonl", valid)
