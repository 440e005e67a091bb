"""The runs of bench/plan.py: real `mule train` processes of a few updates, and what they are made of.

Half of them fit the constants, the other half are kept out of it; which is which follows from the order.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WORDS, CHATS = 260_000, 1_500
VOCABULARY = 2_048
BASES = {"base5": "model.size=5m", "base25": "model.size=25m", "base50": "model.size=50m"}
_SHARED = ("train.precision=fp32", "checkpoint.every_steps=100000", "evaluate.every_steps=100000")
_SHARED += ("evaluate.max_rows=4", "train.compile=false")
_TEXT = ("data.train=[text.txt]", "data.format=text", "tokenizer.path=tokenizer")
_CHATS = ("data.train=[chats.jsonl]", "data.format=messages")


@dataclass(frozen=True)
class Case:
    """One run: its settings, and whether its figures may be used to fit."""

    name: str
    words: tuple[str, ...]
    fits: bool

    @property
    def settings(self) -> list[str]:
        """All of them; its own replace those that are shared."""
        own = {word.partition("=")[0] for word in self.words}
        return [word for word in _SHARED if word.partition("=")[0] not in own] + list(self.words)


def cases() -> list[Case]:
    """Every run, by kind; the first of two neighbours fits, the second is held out."""
    listed = [
        *_pretraining(),
        *_recomputing(),
        *_optimizers(),
        *_compiled(),
        *_mixers(),
        *_chats(),
        *_adapters(),
        *_in_bf16(),
    ]
    return [Case(name, tuple(words), n % 2 == 0) for n, (name, words) in enumerate(listed)]


def _new(size: str, length: int, rows: int, *more: str, parts: int = 1) -> list[str]:
    """A new model on text; an update is so many micro-batches of `rows`."""
    shape = [f"model.size={size}", f"data.max_seq_length={length}"]
    shape += [f"train.step_rows={rows * parts}", f"train.micro_batch_rows={rows}"]
    given = {word.partition("=")[0] for word in more}
    vocabulary = [] if "model.vocab_size" in given else ["model.vocab_size=8192"]
    return [*_TEXT, *shape, *vocabulary, *more]


def _pretraining() -> list[tuple[str, list[str]]]:
    large = "model.vocab_size=32768"
    return [
        ("1m, 8 x 128", _new("1m", 128, 8)),
        ("1m, 4 x 512", _new("1m", 512, 4)),
        ("2m, 8 x 256", _new("2m", 256, 8)),
        ("2m, 2 x 1024", _new("2m", 1024, 2)),
        ("5m, 4 x 256", _new("5m", 256, 4)),
        ("5m, 8 x 512", _new("5m", 512, 8)),
        ("5m, 1 x 1024", _new("5m", 1024, 1)),
        ("10m, 2 x 256", _new("10m", 256, 2)),
        ("10m, 4 x 512", _new("10m", 512, 4)),
        ("10m, 2 x 1024 twice", _new("10m", 1024, 2, parts=2)),
        ("25m, 4 x 256", _new("25m", 256, 4, large)),
        ("25m, 2 x 1024", _new("25m", 1024, 2, large)),
        ("25m, 1 x 128", _new("25m", 128, 1, large)),
        ("50m, 2 x 512", _new("50m", 512, 2, large)),
        ("50m, 4 x 256", _new("50m", 256, 4)),
        ("10m, 8 x 128 four times", _new("10m", 128, 8, parts=4)),
    ]


def _recomputing() -> list[tuple[str, list[str]]]:
    key = "train.activation_checkpointing"
    return [
        ("10m, 4 x 512, selective", _new("10m", 512, 4, f"{key}=selective")),
        ("25m, 4 x 512, selective", _new("25m", 512, 4, f"{key}=selective")),
        ("10m, 4 x 512, full", _new("10m", 512, 4, f"{key}=full")),
        ("5m, 4 x 1024, full", _new("5m", 1024, 4, f"{key}=full")),
    ]


def _optimizers() -> list[tuple[str, list[str]]]:
    return [
        ("25m, 4 x 256, muon", _new("25m", 256, 4, "optim.kind=muon")),
        ("5m, 4 x 256, muon", _new("5m", 256, 4, "optim.kind=muon")),
        ("25m, 4 x 256, 8 bits", _new("25m", 256, 4, "optim.kind=adamw8bit")),
        ("50m, 2 x 256, 8 bits", _new("50m", 256, 2, "optim.kind=adamw8bit")),
        ("10m, 4 x 256, average", _new("10m", 256, 4, "optim.ema_decay=0.99")),
        ("25m, 2 x 256, average", _new("25m", 256, 2, "optim.ema_decay=0.99")),
    ]


def _compiled() -> list[tuple[str, list[str]]]:
    key = "train.compile=true"
    return [
        ("5m, 4 x 512, compiled", _new("5m", 512, 4, key)),
        ("10m, 4 x 256, compiled", _new("10m", 256, 4, key)),
        ("25m, 4 x 512, compiled", _new("25m", 512, 4, key)),
        ("50m, 2 x 512, compiled", _new("50m", 512, 2, key)),
    ]


def _mixers() -> list[tuple[str, list[str]]]:
    experts = ("model.family=qwen3_moe", "model.moe.num_experts=8", "model.moe.experts_per_token=2")
    mamba2 = ("model.family=granitemoehybrid", "model.mamba.kind=mamba2")
    return [
        ("5m, 4 x 256, experts", _new("5m", 256, 4, *experts)),
        ("10m, 2 x 512, experts", _new("10m", 512, 2, *experts)),
        ("5m, 4 x 512, mamba2", _new("5m", 512, 4, *mamba2)),
        ("10m, 2 x 256, mamba2", _new("10m", 256, 2, *mamba2)),
    ]


def _chats() -> list[tuple[str, list[str]]]:
    """Packed rows, by mask up to 512 tokens and by document above; new models and trained ones."""
    found = []
    for name, base, length, rows in (
        ("5m", "base5", 512, 4),
        ("25m", "base25", 512, 2),
        ("5m", "base5", 1024, 2),
        ("25m", "base25", 1024, 1),
    ):
        words = [*_CHATS, f"model.path={base}", f"data.max_seq_length={length}"]
        words += [f"train.step_rows={rows}", f"train.micro_batch_rows={rows}"]
        found.append((f"{name}, {rows} x {length}, chats", words))
    return found


def _adapters() -> list[tuple[str, list[str]]]:
    found = []
    for name, base, kind, rows, more in (
        ("25m, 4 x 512, LoRA", "base25", "lora", 4, ()),
        ("50m, 2 x 512, LoRA", "base50", "lora", 2, ()),
        ("50m, 4 x 512, LoRA, last 4", "base50", "lora", 4, ("adapter.lora.last_layers=4",)),
        ("25m, 4 x 512, LoRA, last 2", "base25", "lora", 4, ("adapter.lora.last_layers=2",)),
        ("25m, 2 x 512, QLoRA", "base25", "qlora", 2, ()),
        ("50m, 4 x 512, QLoRA", "base50", "qlora", 4, ()),
    ):
        words = [*_CHATS, f"model.path={base}", "data.max_seq_length=512", f"adapter.kind={kind}"]
        words += [f"train.step_rows={rows}", f"train.micro_batch_rows={rows}"]
        words += ["adapter.trunk_cache=off", *more]
        found.append((name, words))
    return found


def _in_bf16() -> list[tuple[str, list[str]]]:
    """Where the processor multiplies bf16, what a run takes unless told otherwise."""
    known = dict([*_pretraining(), *_compiled(), *_mixers(), *_chats(), *_adapters()])
    names = ("10m, 4 x 512", "25m, 2 x 1024", "25m, 4 x 512, compiled", "10m, 4 x 256, compiled")
    names += ("5m, 4 x 256, experts", "10m, 2 x 512, experts", "5m, 4 x 512, mamba2")
    names += ("10m, 2 x 256, mamba2", "25m, 2 x 512, chats", "50m, 2 x 512, LoRA")
    return [(f"{name}, bf16", [*known[name], "train.precision=bf16"]) for name in names]


# ---------------------------------------------------------------- what they need


def set_up(folder: Path) -> None:
    """Text, chats, a tokenizer, and the models to start from; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "chats.jsonl").is_file():
        _write_data(folder)
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        code = (
            "import sys; from pathlib import Path; from mule.tokenizer import Tokenizer\n"
            "text = Path('text.txt').read_text()[:400_000].splitlines()\n"
            f"Tokenizer.train(text, {VOCABULARY}).save('tokenizer')\n"
        )
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    for name, size in BASES.items():
        if not (folder / name / "config.json").is_file():
            _make_base(folder, name, size)


def _make_base(folder: Path, name: str, size: str) -> None:
    """A model folder with random weights, and the vocabulary of a model that people fine-tune."""
    words = [*_TEXT, size, "model.vocab_size=32768", "model.max_position_embeddings=2048"]
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from mule import fsio\n"
        "from mule.config.load import load_recipe\n"
        "from mule.models.decoder import empty_decoder\n"
        "from mule.models.folder import model_state, save_model\n"
        "from mule.plan.shape import new_model_config\n"
        "from mule.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.load('tokenizer')\n"
        "recipe = load_recipe(None, sys.argv[2:]).recipe\n"
        "config = new_model_config(recipe, tokenizer.vocab_size)\n"
        "model = empty_decoder(config, torch.float32)\n"
        "model.init_weights(0)\n"
        "with fsio.atomic_folder(Path(sys.argv[1])) as out:\n"
        "    tokenizer.save(out)\n"
        "    extra = {'eos_token_id': tokenizer.stop_ids[0]}\n"
        "    save_model(model_state(model), config, out, extra=extra)\n"
    )
    subprocess.run([sys.executable, "-c", code, name, *words], cwd=folder, check=True)


def _write_data(folder: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(6000)]
    weights = [1 / (n + 3) for n in range(len(words))]

    def text(count: int) -> str:
        return " ".join(draw.choices(words, weights, k=count))

    lines = [text(13) + "." for _ in range(WORDS // 13)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = []
    for _ in range(CHATS):
        question, answer = text(draw.randint(5, 40)), text(draw.randint(10, 120))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}))
    (folder / "chats.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
