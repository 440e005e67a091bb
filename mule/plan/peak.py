"""The most memory that a run holds, by part, and in which phase of an update. Pure; no torch.

The closed forms are those of mule/plan/memory.py. What a process holds beside its tensors (libraries,
buffers of the products, fragments) was measured: mule/plan/fitted.json, by bench/plan.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mule.config.adapter import AdapterSection
from mule.config.schema import Recipe, TrainSection
from mule.models.config import ModelConfig
from mule.plan import memory
from mule.plan.block_memory import block_bytes
from mule.plan.fitted import Fitted
from mule.plan.resolve import Facts
from mule.plan.trunk import kept_bytes

_UPDATE_BYTES = 16  # of a weight: AdamW's temporaries on a GPU where nothing is fused
_CHUNK_TOKENS = {"cpu": 512, "gpu": 4096}  # of the loss, as mule.models.loss cuts them
_CACHED_LOGITS = 1 << 21  # numbers that eager softmax on a CPU works on at once; as there
_SOFTMAX_BYTES = 12  # of a number that softmax works on, beside its logit
_EMBEDDING_BYTES = 4  # of the table: its gradient, before it is added


@dataclass(frozen=True)
class Process:
    """What a process takes before it holds a tensor, in bytes; a GPU's context where there is one."""

    imports: float
    compiler: float
    tokenizer_rows: int = 0


@dataclass(frozen=True)
class Peak:
    """The most that one process holds: `parts` of the phase that needs most, by name, in bytes."""

    parts: dict[str, int]
    phase: str
    phases: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def peak_memory(
    config: ModelConfig, recipe: Recipe, facts: Facts, process: Process, fitted: Fitted
) -> Peak:
    """Of one process of a run with everything decided; on a GPU, of its device."""
    lasting = _lasting(config, recipe, facts, process, fitted)
    passing = _passing(config, recipe, facts, fitted)
    phases = {name: round(sum(parts.values())) for name, parts in passing.items()}
    phase = max(phases, key=lambda name: phases[name])
    parts = lasting | passing[phase]
    held = sum(lasting.values())
    return Peak(
        {name: round(size) for name, size in parts.items() if size >= 1},
        phase,
        {name: round(held + size) for name, size in phases.items()},
    )


def micro_batches(recipe: Recipe, facts: Facts) -> int:
    """How many parts one process cuts its share of an update into."""
    share = math.ceil(int(recipe.train.step_rows or 1) / facts.num_processes)
    return math.ceil(share / rows_at_once(recipe, facts))


def rows_at_once(recipe: Recipe, facts: Facts) -> int:
    """Rows of a micro-batch of one process."""
    share = math.ceil(int(recipe.train.step_rows or 1) / facts.num_processes)
    return min(int(recipe.train.micro_batch_rows), share)


def num_shards(recipe: Recipe, facts: Facts) -> int:
    """Among how many processes the state is divided."""
    shards = {"full": facts.num_processes, "hybrid": facts.processes_per_machine}
    return shards.get(str(recipe.train.sharding), 1)


# ---------------------------------------------------------------- what stays


def _lasting(
    config: ModelConfig, recipe: Recipe, facts: Facts, process: Process, fitted: Fitted
) -> dict[str, float]:
    """By part: what is there from the first update to the last."""
    accumulates = micro_batches(recipe, facts) > 1 or facts.num_processes > 1
    state = memory.state_bytes(config, recipe, accumulates=accumulates)
    shards = num_shards(recipe, facts)
    shared = {name: state[name] / shards for name in state}
    rows = process.tokenizer_rows * fitted.memory["bytes_a_token_of_the_vocabulary"]
    own = process.imports + fitted.memory["process"] + rows
    if "adamw8bit" in (kinds := (recipe.optim.kind, recipe.adapter.kind)) or "qlora" in kinds:
        own += fitted.memory["bitsandbytes"]
    if recipe.optim.kind == "adamw8bit":
        own += fitted.memory["moments_in_8_bits"]
    compiled = bool(recipe.train.compile) and recipe.train.device == "cpu"
    found = {
        "libraries": own if recipe.train.device == "cpu" else process.imports,
        "compiler": process.compiler + fitted.memory["compiling"] if compiled else 0.0,
        "weights": shared["weights"] + state["dequantized"],
        "masters": shared["masters"],
        "gradients": shared["gradients"] + shared["gradient_sums"],
        "optimizer": shared["moments"] + shared["average"],
    }
    if recipe.adapter.trunk_cache == "memory" and recipe.train.device != "cuda":
        rows_kept = facts.num_rows + facts.num_valid_rows
        found["cache"] = kept_bytes(recipe, config, rows_kept, facts.row_length)
    return found


# ---------------------------------------------------------------- what comes and goes


def _passing(
    config: ModelConfig, recipe: Recipe, facts: Facts, fitted: Fitted
) -> dict[str, dict[str, float]]:
    """By phase, then by part."""
    train, rows = recipe.train, rows_at_once(recipe, facts)
    tokens = rows * facts.row_length
    mask = memory.mask_length(config, train, facts.row_length, isolated=facts.isolated)
    kind = str(train.activation_checkpointing)
    measures = config, train, kind, mask, recipe.adapter
    kept = tokens * memory.kept_bytes_per_token(*measures)
    whole = tokens * memory.activation_bytes_per_token(*measures)
    spread = fitted.memory["compiled_activations" if train.compile else "activations"]
    head = _head_gradient(config, recipe)
    largest = largest_group(config, recipe)
    by_blocks = bool(train.compile) or train.device == "cpu"  # that stay in a processor's cache
    update = 0 if by_blocks else largest * _UPDATE_BYTES
    experts = memory.state_bytes(config, recipe, accumulates=False)["experts_at_work"]
    table = 0 if head == 0 else config.vocab_size * config.hidden_size * _EMBEDDING_BYTES
    return {
        "loss": {"activations": spread * kept, "loss": head + loss_at_work(config, recipe, facts)},
        "backward pass": {"activations": spread * whole + experts, "loss": head},
        "end of the backward pass": {"activations": experts, "loss": table + head},
        "update": {"update": update / num_shards(recipe, facts)},
        "evaluation": {
            "evaluation": spread * tokens * _forward_bytes(measures)
            + loss_at_work(config, recipe, facts, compiled=False)
        },
    }


def loss_at_work(
    config: ModelConfig, recipe: Recipe, facts: Facts, *, compiled: bool | None = None
) -> float:
    """Bytes of the logits of one chunk, and of softmax on them.

    A small batch is less than a chunk; eager softmax on a CPU takes a few rows at once.
    """
    on_cpu = recipe.train.device == "cpu"
    fused = bool(recipe.train.compile) if compiled is None else compiled
    targets = rows_at_once(recipe, facts) * facts.targets_per_row
    chunk = min(targets, _CHUNK_TOKENS["cpu" if on_cpu else "gpu"])
    logits = chunk * config.vocab_size
    at_once = min(logits, max(_CACHED_LOGITS, config.vocab_size)) if on_cpu else logits
    size = memory.width(str(recipe.train.precision))
    return size * logits + (0 if fused else _SOFTMAX_BYTES * at_once)


def largest_group(config: ModelConfig, recipe: Recipe) -> int:
    """Elements of the largest group that AdamW updates at once: the matrices, or the embedding.

    Muon and 8-bit AdamW go matrix by matrix, and leave the embedding to AdamW.
    """
    groups = memory.trained_elements(config, recipe)
    by_matrix = recipe.optim.kind != "adamw"
    return max(0 if by_matrix else groups["matrices"], groups["others"])


def _head_gradient(config: ModelConfig, recipe: Recipe) -> float:
    """Of the head, made in the forward pass; frozen heads have none."""
    if recipe.adapter.kind != "none":
        return 0.0
    return config.vocab_size * config.hidden_size * memory.width(str(recipe.train.precision))


def _forward_bytes(measures: tuple[ModelConfig, TrainSection, str, int, AdapterSection]) -> float:
    """Of one token, while a block is computed and nothing is kept: half of what it would keep."""
    config, train, _, mask, adapter = measures
    layers = range(config.num_layers)
    return max(block_bytes(config, layer, train, mask, adapter) for layer in layers) / 2
