"""Every "auto" is decided here, once, with its reason. A pure function; no torch.

The result is saved in the run and frozen: a resumed run computes what it computed before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mule.config.schema import Recipe
from mule.errors import ConfigError
from mule.models import cost
from mule.models.config import ModelConfig, named_size

_CPU_MICRO_TOKENS = 8192  # enough rows for full-speed matmuls; not tuned yet
_GPU_MICRO_TOKENS = 65536  # a guess: no GPU has been measured
_COMPILE_SECONDS = 30.0  # first step of a compiled run with a cold cache, two cores (docs/log.md)
_COMPILE_GAIN = 0.35  # share of the eager time that compiling saves (docs/log.md)
_EAGER_SHARE_OF_PEAK = 0.25  # cautious: a wrong "yes" costs more than a wrong "no"


@dataclass(frozen=True)
class Facts:
    """What resolving needs to know of the machine and the prepared data."""

    num_rows: int
    row_length: int
    targets_per_row: float
    examples_per_row: float
    cpu_cores: int
    fast_bf16: bool
    cpp_compiler: bool
    available_bytes: int
    matmul_peak_flops: float
    cuda: bool = False
    mps: bool = False


@dataclass(frozen=True)
class Resolved:
    """A recipe without "auto"; `reasons` says why for each key that was decided here."""

    recipe: Recipe
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        assert self.recipe.train.steps is not None
        return self.recipe.train.steps

    @property
    def step_rows(self) -> int:
        assert self.recipe.train.step_rows is not None
        return self.recipe.train.step_rows


def new_model_config(recipe: Recipe, tokenizer_size: int) -> ModelConfig:
    """The shape of a model trained from scratch."""
    m = recipe.model
    if m.size is None and (m.hidden_size is None or m.num_layers is None or m.num_heads is None):
        raise ConfigError(
            ["the model has no shape: neither model.size, nor model.path, nor all dimensions"],
            "set model.size (for example 10m), or model.path to start from a trained model",
        )
    named = named_size(m.size) if m.size else None

    def pick(name: str, fallback: int) -> int:
        given = getattr(m, name)
        return given or (getattr(named, name) if named else fallback)

    hidden, heads = pick("hidden_size", 0), pick("num_heads", 0)
    rows = m.vocab_size or -(-tokenizer_size // 64) * 64
    if rows < tokenizer_size:
        raise ConfigError(
            [f"model.vocab_size = {rows} is below the tokenizer's {tokenizer_size} tokens"],
            "remove model.vocab_size, or raise it",
        )
    return ModelConfig(
        family=m.family,
        vocab_size=rows,
        hidden_size=hidden,
        num_layers=pick("num_layers", 0),
        num_heads=heads,
        num_kv_heads=pick("num_kv_heads", heads),
        head_dim=pick("head_dim", hidden // max(heads, 1)),
        intermediate_size=pick("intermediate_size", -(-hidden * 8 // (3 * 256)) * 256),
        max_position_embeddings=m.max_position_embeddings or recipe.data.max_seq_length,
        rope_theta=m.rope_theta,
        qk_norm=m.family == "qwen3",
        tie_embeddings=m.tie_embeddings,
    )


def resolve(recipe: Recipe, config: ModelConfig, facts: Facts) -> Resolved:
    """Fill every "auto" and every length, and check what only the data and machine can tell."""
    train, reasons = _Filler(recipe, "train"), {}
    _device(train, facts)
    _precision(train, facts)
    _step_rows(train, facts)
    num_steps = _length(train, facts)
    _micro_batch(train, config, facts)
    _compile(train, config, facts)
    optim = _Filler(recipe, "optim")
    optim.fill(
        "warmup_steps",
        min(max(1, round(0.05 * num_steps)), 500, num_steps - 1),
        "5% of the run, at most 500 updates",
    )
    if optim["warmup_steps"] >= num_steps:
        raise ConfigError(
            [f"optim.warmup_steps = {optim['warmup_steps']} is not below the {num_steps} updates"],
            "lower optim.warmup_steps, or train longer",
        )
    evaluate = _Filler(recipe, "evaluate")
    evaluate.fill("every_steps", max(1, math.ceil(num_steps / 20)), "20 evaluations in the run")
    checkpoint = _Filler(recipe, "checkpoint")
    checkpoint.fill("every_steps", max(1, math.ceil(num_steps / 10)), "10 checkpoints in the run")
    sections = (train, optim, evaluate, checkpoint)
    for section in sections:
        reasons |= section.reasons
    return Resolved(
        recipe.model_copy(update={section.name: section.done() for section in sections}), reasons
    )


class _Filler:
    """One section of the recipe while its open values are filled."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self.name = name
        self._section = getattr(recipe, name)
        self._changes: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}

    def __getitem__(self, key: str) -> Any:
        return self._changes.get(key, getattr(self._section, key))

    def open(self, key: str) -> bool:
        return self[key] in (None, "auto")

    def fill(self, key: str, value: Any, reason: str) -> None:
        """Set `key` unless the user did."""
        if self.open(key):
            self.set(key, value, reason)

    def set(self, key: str, value: Any, reason: str) -> None:
        self._changes[key] = value
        self.reasons[f"{self.name}.{key}"] = reason

    def done(self) -> Any:
        return self._section.model_copy(update=self._changes)


def _device(train: _Filler, facts: Facts) -> None:
    if facts.cuda:
        train.fill("device", "cuda", "a CUDA device is present")
    elif facts.mps:
        train.fill("device", "mps", "an Apple GPU is present")
    train.fill("device", "cpu", "no GPU found")
    present = {"cpu": True, "cuda": facts.cuda, "mps": facts.mps}
    if not present[train["device"]]:
        raise ConfigError(
            [f"train.device = {train['device']}, but this machine has none"],
            "set train.device to auto or cpu",
        )
    train.fill("threads", facts.cpu_cores, f"{facts.cpu_cores} physical cores")


def _precision(train: _Filler, facts: Facts) -> None:
    if train["device"] != "cpu":
        train.fill("precision", "bf16", "GPUs compute bf16 several times faster than fp32")
    elif facts.fast_bf16:
        train.fill("precision", "bf16", "this CPU has bf16 instructions (avx512_bf16 or amx_bf16)")
    train.fill("precision", "fp32", "this CPU has no bf16 instructions")


def _step_rows(train: _Filler, facts: Facts) -> None:
    if train["step_rows"] is not None:
        return
    if (tokens := train["step_tokens"]) is not None:
        if tokens < facts.row_length:
            raise ConfigError(
                [f"train.step_tokens = {tokens} is less than one row of {facts.row_length} tokens"],
                "raise train.step_tokens, or lower data.max_seq_length",
            )
        rows, reason = tokens // facts.row_length, f"{tokens} tokens / {facts.row_length} a row"
    elif (examples := train["step_examples"]) is not None:
        rows = max(1, round(examples / facts.examples_per_row))
        reason = f"{examples} examples / {facts.examples_per_row:.2f} a packed row"
    else:
        rows = max(1, 8192 // facts.row_length)
        reason = "about 8,192 tokens an update: small models learn fastest from many updates"
    if rows > facts.num_rows:
        reason += f"; capped at the {facts.num_rows} rows there are"
    train.set("step_rows", min(rows, facts.num_rows), reason)


def _length(train: _Filler, facts: Facts) -> int:
    per_epoch = facts.num_rows / train["step_rows"]
    if train["steps"] is not None:
        return train["steps"]
    if (tokens := train["tokens"]) is not None:
        per_step = facts.targets_per_row * train["step_rows"]
        steps = max(1, round(tokens / per_step))
        reason = f"{tokens:,} tokens / {per_step:,.0f} trained tokens an update"
    else:
        epochs = train["epochs"] or 1.0
        steps = max(1, round(epochs * per_epoch))
        reason = f"{epochs:g} epochs of {per_epoch:.1f} updates"
    train.set("steps", steps, reason)
    return steps


def _micro_batch(train: _Filler, config: ModelConfig, facts: Facts) -> None:
    tokens = _CPU_MICRO_TOKENS if train["device"] == "cpu" else _GPU_MICRO_TOKENS
    by_memory = int(
        facts.available_bytes * 0.5 / activation_bytes_per_token(config, train["precision"])
    )
    rows = max(1, min(tokens, by_memory) // facts.row_length)
    limit = "memory" if by_memory < tokens else f"{tokens} tokens keep the cores busy"
    step_rows = train["step_rows"]
    if rows < step_rows:  # equal parts waste no padding and need one shape only
        parts = math.ceil(step_rows / rows)
        while step_rows % parts:
            parts += 1
        rows = step_rows // parts
    train.fill("micro_batch_rows", min(rows, step_rows), f"{limit}; divides the update evenly")


def activation_bytes_per_token(config: ModelConfig, precision: str) -> float:
    """Bytes kept from forward to backward for one token, attention in blocks."""
    width = 2 if precision == "bf16" else 4
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    per_layer = 6 * config.hidden_size + 4 * heads + 4 * config.intermediate_size
    return width * (config.num_layers * per_layer + 4 * config.hidden_size)


def _compile(train: _Filler, config: ModelConfig, facts: Facts) -> None:
    if not train.open("compile"):
        return
    if train["device"] == "cpu" and not facts.cpp_compiler:
        train.set("compile", False, "no C++ compiler found")
        return
    tokens = train["steps"] * train["step_rows"] * facts.row_length
    flops = tokens * cost.train_flops_per_token(config, facts.row_length)
    eager_seconds = flops / (_EAGER_SHARE_OF_PEAK * facts.matmul_peak_flops)
    pays = eager_seconds * _COMPILE_GAIN > _COMPILE_SECONDS
    word = "more" if pays else "less"
    train.set(
        "compile",
        pays,
        f"about {eager_seconds:,.0f} s without it, of which it saves {_COMPILE_GAIN:.0%}: "
        f"{word} than the {_COMPILE_SECONDS:.0f} s it takes",
    )
