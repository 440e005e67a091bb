"""Every "auto" is decided here, once, with its reason. A pure function; no torch.

The result is saved in the run and frozen: a resumed run computes what it computed before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from mule.config.schema import Recipe
from mule.errors import ConfigError
from mule.models import cost
from mule.models.config import ModelConfig
from mule.plan import fine_tune, memory
from mule.plan.filler import Filler
from mule.plan.length import cadences, fine_tuned_chats, learning_rate, length, step_rows
from mule.plan.micro_batch import Timing, candidates, largest_even_part
from mule.plan.mlx import settle_for_mlx
from mule.plan.shape import check_routing
from mule.plan.sharding import check_sharding, choose_sharding
from mule.plan.trunk import choose_trunk_cache, kept_bytes

_CPU_MICRO_TOKENS = 8192  # enough rows for full-speed matmuls; not tuned yet
_GPU_MICRO_TOKENS = 65536  # a guess: no GPU has been measured
_MIN_SHARE_OF_TOKENS = 8  # timing begins at an eighth of these
COMPILE_SECONDS = 30.0  # first step of a compiled run with a cold cache, two cores (docs/log.md)
_COMPILE_GAIN = 0.35  # share of the eager time that compiling saves (docs/log.md)
_ADAPTER_GAIN = 0.1  # of an adapter's: most of it is products with frozen weights (docs/log.md)
_EAGER_SHARE_OF_PEAK = 0.25  # cautious: a wrong "yes" costs more than a wrong "no"


_MICRO_BATCH = "train.micro_batch_rows"


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
    cuda_bf16: bool = True
    float8: bool = False
    isolated: bool = False  # attention stays inside documents
    num_chats: int = 0  # 0 where the data is documents
    num_processes: int = 1
    processes_per_machine: int = 1
    num_valid_rows: int = 0
    host_bytes: int = 0  # free memory beside the device's
    disk_bytes: int = 0  # free where the run's folder is


@dataclass(frozen=True)
class Resolved:
    """A recipe without "auto"; `reasons` says why for each key that was decided here.

    `candidates` are the micro-batch sizes that are worth timing before the run; often none.
    """

    recipe: Recipe
    reasons: dict[str, str] = field(default_factory=dict)
    candidates: tuple[int, ...] = ()

    @property
    def num_steps(self) -> int:
        assert self.recipe.train.steps is not None
        return self.recipe.train.steps

    @property
    def step_rows(self) -> int:
        assert self.recipe.train.step_rows is not None
        return self.recipe.train.step_rows

    def told(self, facts: Facts, *, validates: bool) -> list[tuple[str, str]]:
        """What to say of a fine-tune on chats before it begins: texts with their levels."""
        if not (chats := fine_tuned_chats(self.recipe, facts)):
            return []
        size = self.num_steps, facts.num_rows / self.step_rows, chats
        patience = self.recipe.evaluate.patience
        warning = fine_tune.by_heart(*size, patience=patience, validates=validates)
        said = [(fine_tune.length_in_words(*size), "info")]
        return said + ([(warning, "warning")] if warning else [])

    def with_micro_batch(self, rows: int, reason: str) -> Resolved:
        """The same with another micro-batch, decided once timing is done."""
        train = self.recipe.train.model_copy(update={"micro_batch_rows": rows})
        recipe = self.recipe.model_copy(update={"train": train})
        return replace(self, recipe=recipe, reasons=self.reasons | {_MICRO_BATCH: reason})


def resolve(recipe: Recipe, config: ModelConfig, facts: Facts) -> Resolved:
    """Fill every "auto" and every length, and check what only the data and machine can tell."""
    check_routing(recipe, config)
    train, adapter, reasons = Filler(recipe, "train"), Filler(recipe, "adapter"), {}
    if recipe.adapter.engine == "mlx":
        settle_for_mlx(recipe, train, adapter, mps=facts.mps, processes=facts.num_processes)
    _device(train, facts)
    _precision(train, recipe, facts)
    chats = fine_tuned_chats(recipe, facts)
    step_rows(train, facts, chats)
    num_steps = length(train, facts, chats)
    _sharding(train, recipe, config, facts)
    facts = _trunk_cache(adapter, train, recipe, config, facts)
    room = _room(train, recipe, config, facts)
    row_bytes = _row_bytes(train, recipe, config, facts)
    _checkpointing(train, row_bytes, room)
    eager_seconds = _eager_seconds(train, recipe, config, facts)
    gain = _COMPILE_GAIN if recipe.adapter.kind == "none" else _ADAPTER_GAIN
    _compile(train, facts, eager_seconds, gain)
    sizes = _micro_batch(train, facts, row_bytes, room, eager_seconds)
    _check_optimizer(recipe, train["device"])
    optim = learning_rate(recipe, num_steps)
    per_epoch = facts.num_rows / train["step_rows"]
    sections = (train, optim, *cadences(recipe, num_steps, per_epoch if chats else None), adapter)
    for section in sections:
        reasons |= section.reasons
    decided = recipe.model_copy(update={section.name: section.done() for section in sections})
    return Resolved(decided, reasons, sizes)


def _device(train: Filler, facts: Facts) -> None:
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


def _precision(train: Filler, recipe: Recipe, facts: Facts) -> None:
    if train["precision"] == "fp8" and recipe.adapter.kind == "qlora":
        raise ConfigError(
            [
                "train.precision = fp8 computes products in 8 bits; those of adapter.kind = qlora "
                "are of weights in 4 bits"
            ],
            "set train.precision=bf16, or adapter.kind=lora",
        )
    if train["precision"] == "fp8" and not (train["device"] == "cuda" and facts.float8):
        raise ConfigError(
            ["train.precision = fp8 needs a CUDA device of capability 8.9 or newer; there is none"],
            "set train.precision=bf16",
        )
    if train["device"] == "cuda" and not facts.cuda_bf16:
        train.fill("precision", "fp16", "this GPU has no bf16 instructions (capability below 8.0)")
    elif train["device"] != "cpu":
        train.fill("precision", "bf16", "GPUs compute bf16 several times faster than fp32")
    elif facts.fast_bf16:
        train.fill("precision", "bf16", "this CPU has bf16 instructions (avx512_bf16 or amx_bf16)")
    train.fill("precision", "fp32", "this CPU has no bf16 instructions")


def _check_optimizer(recipe: Recipe, device: str) -> None:
    kind = recipe.optim.kind
    if kind == "muon" and recipe.adapter.kind != "none":
        raise ConfigError(
            [
                "optim.kind = muon trains whole matrices; the two factors of a LoRA adapter, taken "
                "one by one, are not what it orthogonalises"
            ],
            "set optim.kind=adamw, or train every weight: adapter.kind=none",
        )
    if kind == "adamw8bit" and device == "mps":
        raise ConfigError(
            ["optim.kind = adamw8bit: bitsandbytes has no such update for Apple GPUs"],
            "set optim.kind=adamw, or train.device=cpu",
        )


def _sharding(train: Filler, recipe: Recipe, config: ModelConfig, facts: Facts) -> None:
    decided = recipe.model_copy(update={"train": train.done()})
    processes = facts.num_processes, facts.processes_per_machine
    check_sharding(decided, *processes)
    found = choose_sharding(decided, config, *processes, facts.available_bytes)
    train.fill("sharding", *found)


def _trunk_cache(
    adapter: Filler, train: Filler, recipe: Recipe, config: ModelConfig, facts: Facts
) -> Facts:
    """Fill in where the frozen trunk is kept; the facts, with the memory that this leaves."""
    if recipe.adapter.kind == "none":
        return facts
    decided = recipe.model_copy(update={"train": train.done()})
    needed = kept_bytes(decided, config, facts.num_rows + facts.num_valid_rows, facts.row_length)
    found = choose_trunk_cache(
        decided,
        config,
        epochs=train["steps"] * train["step_rows"] / facts.num_rows,
        needed_bytes=needed,
        free_memory=facts.host_bytes,
        free_disk=facts.disk_bytes,
    )
    adapter.fill("trunk_cache", *found)
    if adapter["trunk_cache"] != "memory" or train["device"] == "cuda":
        return facts
    return replace(facts, available_bytes=max(0, facts.available_bytes - needed))


def _room(train: Filler, recipe: Recipe, config: ModelConfig, facts: Facts) -> float:
    """Bytes that the activations of this process may take."""
    decided = recipe.model_copy(update={"train": train.done()})
    shards = {"full": facts.num_processes, "hybrid": facts.processes_per_machine}
    num_shards = shards.get(train["sharding"], 1)
    return memory.free_for_activations(config, decided, facts.available_bytes, num_shards)


def _row_bytes(
    train: Filler, recipe: Recipe, config: ModelConfig, facts: Facts
) -> dict[str, float]:
    """Bytes of activations of one row, by what is computed again."""
    length, section = facts.row_length, train.done()
    mask_length = memory.mask_length(config, section, length, isolated=facts.isolated)
    return {
        kind: length
        * memory.activation_bytes_per_token(config, section, kind, mask_length, recipe.adapter)
        for kind in ("none", "selective", "full")
    }


def _checkpointing(train: Filler, row_bytes: dict[str, float], room: float) -> None:
    """Compute again as little as lets the smallest micro-batch fit."""
    if not train.open("activation_checkpointing"):
        return
    rows = 1 if train.open("micro_batch_rows") else train["micro_batch_rows"]
    takes = {kind: rows * needed for kind, needed in row_bytes.items()}
    found = next((kind for kind, needed in takes.items() if needed <= room), "full")
    told = [f"{kind} {needed / 2**20:,.0f} MiB" for kind, needed in takes.items()]
    told = told[: list(takes).index(found) + 1]
    reason = f"activations of {rows} row{'s' * (rows > 1)}: {', '.join(told)}"
    reason += f"; there is room for {room / 2**20:,.0f} MiB"
    if takes[found] > room:
        reason += ", so memory may run out"
    train.set("activation_checkpointing", found, reason)


def _micro_batch(
    train: Filler, facts: Facts, row_bytes: dict[str, float], room: float, eager_seconds: float
) -> tuple[int, ...]:
    """Fill in the rows computed at once; the sizes that are worth timing."""
    if not train.open("micro_batch_rows"):
        return ()
    tokens = _CPU_MICRO_TOKENS if train["device"] == "cpu" else _GPU_MICRO_TOKENS
    fitting = int(room / row_bytes[train["activation_checkpointing"]])
    usual = max(1, tokens // facts.row_length)
    limit = f"{tokens} tokens keep the cores busy"
    if fitting < usual:
        limit = f"memory has room for {max(1, fitting)} row{'s' * (fitting > 1)}"
    share = math.ceil(train["step_rows"] / facts.num_processes)
    rows = largest_even_part(share, min(usual, fitting))
    train.set("micro_batch_rows", rows, f"{limit}; divides the update evenly")
    if train["sharding"] in ("full", "hybrid"):  # their passes are made together
        return ()
    timing = Timing(
        run_rows=train["steps"] * share,
        run_s=eager_seconds,
        compile_s=COMPILE_SECONDS if train["compile"] else 0.0,
    )
    return candidates(share, usual // _MIN_SHARE_OF_TOKENS, fitting, timing)


def _eager_seconds(train: Filler, recipe: Recipe, config: ModelConfig, facts: Facts) -> float:
    """How long the run takes about, without compiling; cautious."""
    tokens = train["steps"] * train["step_rows"] * facts.row_length
    flops = tokens * cost.recipe_flops_per_token(config, recipe.adapter, facts.row_length)
    return flops / (_EAGER_SHARE_OF_PEAK * facts.matmul_peak_flops)


def _compile(train: Filler, facts: Facts, eager_seconds: float, gain: float) -> None:
    if not train.open("compile"):
        return
    if train["device"] != "mps" and not facts.cpp_compiler:  # Triton builds its launchers with it
        train.set("compile", False, "no C++ compiler found")
        return
    pays = eager_seconds * gain > COMPILE_SECONDS
    word = "more" if pays else "less"
    train.set(
        "compile",
        pays,
        f"about {eager_seconds:,.0f} s without it, of which it saves {gain:.0%}: "
        f"{word} than the {COMPILE_SECONDS:.0f} s it takes",
    )
