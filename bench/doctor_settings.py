"""What the fault bench trains: sound recipes of two parts, in which faults are planted.

DEVELOPMENT is for those who write the rules: look at its runs, and tune on them. HELD_OUT is for the
published figures only: other families, shapes, data sets and seeds, which no rule was tuned on. Do not
look at its runs before a rule is finished, and do not change a rule because of what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.doctor_data import ATLAS_CHATS, ATLAS_TEXT

Part = Literal["development", "held-out"]
Kind = Literal["text", "experts", "chat", "adapter"]
PARTS: tuple[Part, ...] = ("development", "held-out")

# Of every run: what a test of seconds needs, and what makes it the same on every machine.
COMMON: dict[str, Any] = {
    "train.precision": "fp32",
    "train.compile": False,
    "train.threads": 1,
    "data.valid_share": 0.1,
    "evaluate.max_rows": 16,
}
LORA: dict[str, Any] = {
    "adapter.kind": "lora",
    "adapter.lora.r": 8,
    "adapter.lora.alpha": 16,
    "optim.learning_rate": 0.004,
    "adapter.trunk_cache": "off",
}


BASE_ROWS = 1000  # of each of its two data sets
BASE_TEXT: dict[str, Any] = {
    "train.steps": 1200,
    "train.step_rows": 8,
    "data.max_seq_length": 128,
    "model.max_position_embeddings": 256,
    "optim.learning_rate": 0.003,
    "evaluate.every_steps": 200,
    "checkpoint.every_steps": 600,
}
BASE_CHATS: dict[str, Any] = {
    "train.steps": 250,
    "train.step_rows": 6,
    "data.max_seq_length": 192,
    "optim.learning_rate": 0.0015,
    "evaluate.every_steps": 50,
    "checkpoint.every_steps": 125,
}


@dataclass(frozen=True)
class Setting:
    """A sound run: `rows` of a data set, a model of its own or a trained base, and a recipe."""

    kind: Kind
    data: str
    num_rows: int
    recipe: Mapping[str, Any]
    base: str | None = None
    evaluations: int = 12

    @property
    def steps(self) -> int:
        return self.recipe["train.steps"]


@dataclass(frozen=True)
class Base:
    """A model to fine-tune: trained on a text, then on chats."""

    text: str
    chats: str
    recipe: Mapping[str, Any] = field(default_factory=dict)


def _shape(family: str, hidden: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    shape = {"family": family, "hidden_size": hidden, "num_layers": layers, "num_heads": heads}
    shape |= {"num_kv_heads": kv_heads, "intermediate_size": 2 * hidden + 32}
    return {f"model.{key}": value for key, value in shape.items()}


def _experts(family: str, hidden: int, layers: int, experts: int) -> dict[str, Any]:
    shape = _shape(family, hidden, layers, 4, 2)
    del shape["model.intermediate_size"]
    shape |= {"model.moe.num_experts": experts, "model.moe.intermediate_size": 64}
    if family == "granitemoeshared":
        shape["model.moe.shared_intermediate_size"] = 32
    return shape


def _length(steps: int, rows: int, tokens: int, rate: float) -> dict[str, Any]:
    return {
        "train.steps": steps,
        "train.step_rows": rows,
        "data.max_seq_length": tokens,
        "optim.learning_rate": rate,
    }


_DEVELOPMENT_BASE = _shape("qwen3", 96, 3, 4, 2) | {"tokenizer.vocab_size": 1024}
_HELD_OUT_BASE = _shape("llama", 112, 3, 4, 4) | {"tokenizer.vocab_size": 1280}
_HELD_OUT_DEEP = _shape("llama", 72, 5, 3, 1) | {"tokenizer.vocab_size": 896}

BASES: dict[Part, dict[str, Base]] = {
    "development": {
        "novels": Base("novels", "alpaca", _DEVELOPMENT_BASE),
        "atlas": Base(ATLAS_TEXT, "alpaca", _DEVELOPMENT_BASE | {"model.num_layers": 2}),
    },
    "held-out": {
        "stories": Base("stories", "instructions", _HELD_OUT_BASE),
        "web": Base("web", "instructions", _HELD_OUT_DEEP),
    },
}

SETTINGS: dict[Part, dict[str, Setting]] = {
    "development": {
        "atlas, qwen3": Setting(
            "text",
            ATLAS_TEXT,
            330,
            _shape("qwen3", 64, 2, 4, 2)
            | {"tokenizer.vocab_size": 768}
            | _length(160, 8, 64, 0.004),
        ),
        "shakespeare, qwen3": Setting(
            "text",
            "shakespeare",
            500,
            _shape("qwen3", 96, 3, 6, 3)
            | {"tokenizer.vocab_size": 1024, "optim.schedule": "wsd"}
            | _length(140, 8, 96, 0.003),
        ),
        "novels, qwen3": Setting(
            "text",
            "novels",
            420,
            _shape("qwen3", 128, 2, 4, 1)
            | {"tokenizer.vocab_size": 1024, "optim.schedule": "linear"}
            | _length(200, 10, 64, 0.003),
        ),
        "novels, qwen3_moe": Setting(
            "experts",
            "novels",
            420,
            _experts("qwen3_moe", 64, 2, 8)
            | {"tokenizer.vocab_size": 768}
            | _length(140, 8, 64, 0.003),
        ),
        "atlas, qwen3_moe": Setting(
            "experts",
            ATLAS_TEXT,
            330,
            _experts("qwen3_moe", 80, 2, 6)
            | {"tokenizer.vocab_size": 768, "optim.schedule": "wsd"}
            | _length(160, 8, 64, 0.003),
        ),
        "atlas chats": Setting(
            "chat", ATLAS_CHATS, 1500, _length(150, 6, 192, 0.0015), base="atlas"
        ),
        "dolly": Setting("chat", "dolly", 1100, _length(120, 6, 192, 0.0015), base="novels"),
        "atlas chats, LoRA": Setting(
            "adapter", ATLAS_CHATS, 1500, _length(140, 6, 192, 0.004) | LORA, base="novels"
        ),
        "dolly, LoRA": Setting(
            "adapter", "dolly", 1100, _length(120, 6, 192, 0.004) | LORA, base="novels"
        ),
    },
    "held-out": {
        "stories, llama": Setting(
            "text",
            "stories",
            600,
            _shape("llama", 80, 4, 5, 5)
            | {"tokenizer.vocab_size": 896}
            | _length(180, 6, 112, 0.003),
        ),
        "romans, llama": Setting(
            "text",
            "romans",
            290,
            _shape("llama", 112, 2, 7, 1)
            | {"tokenizer.vocab_size": 1280, "optim.schedule": "wsd"}
            | _length(150, 9, 80, 0.0035),
        ),
        "web, granite": Setting(
            "text",
            "web",
            500,
            _shape("granitemoehybrid", 88, 3, 4, 2)
            | {"model.mamba.kind": "none", "tokenizer.vocab_size": 1152}
            | _length(160, 12, 56, 0.003),
        ),
        "wiki, llama": Setting(
            "text",
            "wiki",
            600,
            _shape("llama", 144, 2, 6, 2)
            | {"tokenizer.vocab_size": 1536, "optim.schedule": "linear"}
            | _length(220, 7, 72, 0.002),
        ),
        "stories, granite": Setting(
            "experts",
            "stories",
            600,
            _experts("granitemoeshared", 72, 2, 12)
            | {"tokenizer.vocab_size": 896}
            | _length(150, 8, 72, 0.003),
        ),
        "wiki, granite": Setting(
            "experts",
            "wiki",
            600,
            _experts("granitemoeshared", 104, 3, 5)
            | {"tokenizer.vocab_size": 1280, "optim.schedule": "linear"}
            | _length(130, 8, 64, 0.0025),
        ),
        "gsm8k": Setting("chat", "gsm8k", 1200, _length(130, 5, 256, 0.0012), base="stories"),
        "pairs": Setting("chat", "pairs", 850, _length(110, 6, 192, 0.0015), base="web"),
        "gsm8k, LoRA": Setting(
            "adapter",
            "gsm8k",
            1200,
            _length(120, 5, 256, 0.004) | LORA | {"adapter.lora.r": 4, "adapter.lora.alpha": 8},
            base="stories",
        ),
        "pairs, LoRA": Setting(
            "adapter", "pairs", 850, _length(110, 6, 192, 0.004) | LORA, base="web"
        ),
    },
}


@dataclass(frozen=True)
class Healthy:
    """A setting with changes that are as sound as it is."""

    setting: str
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    interrupted: bool = False  # half-way, and resumed

    @property
    def name(self) -> str:
        changed = [f"{key.split('.')[-1]}={value}" for key, value in self.changes.items()]
        return ", ".join([self.setting, *changed] + ["resumed"] * self.interrupted)


# What of a text's settings can be otherwise without harm.
_VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"optim.schedule": "constant"},
    {"optim.kind": "muon"},
    {"train.dropout": 0.1},
    {"train.steps": 60},
    {"train.steps": 400, "train.step_rows": 5},
    {"train.step_rows": 20, "train.steps": 80},
    {"optim.weight_decay": 0.0, "optim.beta2": 0.99},
    {"optim.warmup_steps": 30},
    {"optim.min_learning_rate": 0.0003},
    {"data.document_mask": True},
    {"optim.ema_decay": 0.98},
    {"train.micro_batch_rows": 2},
)
_TUNED_VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"optim.schedule": "constant"},
    {"train.steps": 60},
    {"optim.schedule": "linear", "optim.warmup_steps": 15},
    {"train.step_rows": 16, "train.steps": 70},
    {"data.packing": False, "train.step_rows": 12},
    {"optim.weight_decay": 0.0},
)


def healthy_runs(part: Part) -> list[Healthy]:
    """Every setting as it is, twice in the held-out part, with each a few changes, and some resumed."""
    first = 0 if part == "development" else 100
    settings, found = SETTINGS[part], []
    for place, (name, setting) in enumerate(settings.items()):
        tuned = setting.kind in ("chat", "adapter")
        variants = _TUNED_VARIANTS if tuned else _VARIANTS
        found.append(Healthy(name, first + place))
        if part == "held-out":
            found.append(Healthy(name, first + 50 + place))
        number = 2 if part == "held-out" else 1
        for turn in range(number):
            change = variants[(number * place + turn) % len(variants)]
            found.append(Healthy(name, first + place, change))
    for place, name in enumerate(list(settings)[::3]):
        found.append(Healthy(name, first + 70 + place, interrupted=True))
    return found
