"""Will it fit, and how long will it take: the estimate of a run. Pure functions; no torch.

Memory is that of mule/plan/peak.py, time that of mule/plan/work.py times mule/plan/fitted.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from mule.config.schema import Recipe
from mule.models import cost
from mule.models.config import ModelConfig
from mule.plan import memory
from mule.plan.fitted import Fitted
from mule.plan.peak import Peak, Process, peak_memory
from mule.plan.resolve import COMPILE_SECONDS, Facts, Resolved
from mule.plan.trunk import kept_bytes, num_frozen_blocks
from mule.plan.work import Speed, Work, evaluation_work, update_work

Verdict = Literal["fits", "tight", "does not fit"]

MARGIN = 0.2  # of the estimate must be left over for "fits"; its error is in docs/accuracy.md
_TOKENIZER_BYTES_PER_S = 2e6  # that a new BPE learns from (python bench/data.py)
_PREPARED_BYTES_PER_S = {"text": 13e6, "chat": 8e6}  # of files, read to rows (the same)
_WRITTEN_BYTES_PER_S, _FLUSH_S = 2e8, 0.02  # where no disk was measured
_CHECKPOINT_FILES = 8  # that are flushed, with their folder
_CHECKPOINT_BYTES = 4 << 20  # tokenizer, config and state beside the tensors
# Bits of a weight on the whole: llama.cpp's blocks, and the tensors that get more.
_BITS = "f32 32 f16 16 bf16 16 q8_0 8.5 q6_k 6.6 q5_k_m 5.7 q5_k_s 5.5 q4_k_m 4.85 q4_k_s 4.6"
_BITS += " iq4_xs 4.3 q3_k_m 3.9 q2_k 3 mxfp4 5.1"
_EXPORT_BITS = dict(zip(_BITS.split()[::2], map(float, _BITS.split()[1::2])))


@dataclass(frozen=True)
class Hardware:
    """The machine that is planned for; `free_bytes` of one device, `times` as of fitted.json.

    `is_calibrated` says that its rates were measured, and `basis` where all of it comes from.
    """

    name: str
    device: str
    count: int
    speed: Speed
    process: Process
    free_bytes: int
    times: dict[str, float]
    is_calibrated: bool
    basis: str
    import_s: float = 4.0
    disk_bytes_per_s: float = _WRITTEN_BYTES_PER_S
    flush_s: float = _FLUSH_S
    free_disk_bytes: int | None = None
    watts: float | None = None


@dataclass(frozen=True)
class Sources:
    """What has to be done before the first update: bytes of files, and what of it is left to do."""

    kind: str
    num_bytes: int
    num_tokens: int
    is_prepared: bool
    trains_tokenizer: bool
    download_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Bytes, seconds and counts; `seconds` by phase."""

    resolved: Resolved
    peak: Peak
    verdict: Verdict
    free_bytes: int
    disk: dict[str, int]
    counts: dict[str, float]
    seconds: dict[str, float]
    update_s: float
    share_of_peak: float
    kinds: dict[str, float] = field(default_factory=dict)  # seconds of an update, by kind of work

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


def estimate(
    config: ModelConfig,
    resolved: Resolved,
    facts: Facts,
    hardware: Hardware,
    sources: Sources,
    *,
    fitted: Fitted,
) -> Estimate:
    """Of a run whose settings are all decided."""
    recipe = resolved.recipe
    peak = peak_memory(config, recipe, facts, hardware.process, fitted)
    first, later = _update_seconds(config, recipe, facts, hardware)
    steps, per_epoch = resolved.num_steps, facts.num_rows / resolved.step_rows
    in_first = min(steps, math.ceil(per_epoch))
    training = in_first * first + (steps - in_first) * later
    mean = training / steps
    tokens = resolved.step_rows * facts.row_length
    flops = tokens * cost.recipe_flops_per_token(config, recipe.adapter, facts.row_length)
    rate = hardware.speed.matmul_flops * hardware.count
    return Estimate(
        resolved=resolved,
        peak=peak,
        verdict=verdict(peak.total, hardware.free_bytes),
        free_bytes=hardware.free_bytes,
        disk=_disk(config, recipe, facts, sources),
        counts=_counts(config, resolved, facts),
        seconds=_seconds(config, resolved, facts, hardware, sources, training),
        update_s=mean,
        share_of_peak=flops / mean / rate,
        kinds=_timed(update_work(config, recipe, facts, hardware.speed), hardware.times),
    )


def verdict(needed_bytes: float, free_bytes: float) -> Verdict:
    """Whether it fits; tight where the estimate's own error decides."""
    if needed_bytes * (1 + MARGIN) <= free_bytes:
        return "fits"
    return "tight" if needed_bytes <= free_bytes else "does not fit"


def update_seconds(
    config: ModelConfig, recipe: Recipe, facts: Facts, hardware: Hardware, *, kept: bool = False
) -> float:
    """Of one update; with `kept` what the frozen blocks give was computed before."""
    work = update_work(config, recipe, facts, hardware.speed, trunk_kept=kept)
    return sum(_timed(work, hardware.times).values())


def checkpoint_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """On disk: fp32 masters, moments and averages, and with all weights trained the frozen ones."""
    state = memory.state_bytes(config, recipe, accumulates=False)
    elements = sum(memory.trained_elements(config, recipe).values())
    frozen = cost.total_params(config) - elements if recipe.adapter.kind == "none" else 0
    return round(4 * (elements + frozen) + state["moments"] + state["average"]) + _CHECKPOINT_BYTES


def num_checkpoints(recipe: Recipe, steps: int) -> int:
    """That the schedule makes, the last one included."""
    return math.ceil(steps / int(recipe.checkpoint.every_steps))


def kept_checkpoints(recipe: Recipe, steps: int) -> int:
    """At once on the disk: the newest, the best, and the one being written."""
    return min(num_checkpoints(recipe, steps), recipe.checkpoint.keep + 2)


# ---------------------------------------------------------------- time


def _timed(work: Work, times: dict[str, float]) -> dict[str, float]:
    return {name: value * times.get(name, 1.0) for name, value in work.items()}


def _update_seconds(
    config: ModelConfig, recipe: Recipe, facts: Facts, hardware: Hardware
) -> tuple[float, float]:
    """Of an update in the first epoch, and of a later one."""
    first = update_seconds(config, recipe, facts, hardware)
    if recipe.adapter.trunk_cache not in ("memory", "disk"):
        return first, first
    return first, update_seconds(config, recipe, facts, hardware, kept=True)


def _seconds(
    config: ModelConfig,
    resolved: Resolved,
    facts: Facts,
    hardware: Hardware,
    sources: Sources,
    training: float,
) -> dict[str, float]:
    """By phase, in the order in which they happen."""
    recipe = resolved.recipe
    rows = evaluation_work(config, recipe, facts, hardware.speed)
    one_evaluation = sum(_timed(rows, hardware.times).values())
    evaluations = math.ceil(resolved.num_steps / int(recipe.evaluate.every_steps))
    size = checkpoint_bytes(config, recipe)
    a_save = size / hardware.disk_bytes_per_s + _CHECKPOINT_FILES * hardware.flush_s
    trials = len(resolved.candidates)
    found = {
        "preparing": _preparing(sources),
        "starting": hardware.import_s + size / hardware.disk_bytes_per_s / 4,
        "compiling": COMPILE_SECONDS * (1 + trials) if recipe.train.compile else 0.0,
        "training": training,
        "evaluating": evaluations * one_evaluation,
        "saving": num_checkpoints(recipe, resolved.num_steps) * a_save,
    }
    return {name: seconds for name, seconds in found.items() if seconds > 0}


def _preparing(sources: Sources) -> float:
    """Tokenizer and rows, where they are not there yet; fetching depends on the network."""
    if sources.is_prepared:
        return 0.0
    rows = sources.num_bytes / _PREPARED_BYTES_PER_S[sources.kind]
    learning = sources.num_bytes / _TOKENIZER_BYTES_PER_S if sources.trains_tokenizer else 0.0
    return rows + learning


# ---------------------------------------------------------------- counts and disk


def _counts(config: ModelConfig, resolved: Resolved, facts: Facts) -> dict[str, float]:
    recipe, steps = resolved.recipe, resolved.num_steps
    rows = steps * resolved.step_rows
    elements = sum(memory.trained_elements(config, recipe).values())
    return {
        "parameters": cost.total_params(config),
        "active_parameters": cost.active_params(config),
        "trained_parameters": elements,
        "rows": facts.num_rows,
        "row_length": facts.row_length,
        "updates": steps,
        "rows_an_update": resolved.step_rows,
        "tokens_an_update": resolved.step_rows * facts.row_length,
        "tokens": rows * facts.row_length,
        "trained_tokens": round(rows * facts.targets_per_row),
        "epochs": rows / facts.num_rows,
        "evaluations": math.ceil(steps / int(recipe.evaluate.every_steps))
        if facts.num_valid_rows
        else 0,
        "checkpoints": num_checkpoints(recipe, steps),
    }


def _disk(config: ModelConfig, recipe: Recipe, facts: Facts, sources: Sources) -> dict[str, int]:
    """By part, at the fullest."""
    steps = int(recipe.train.steps or 1)
    token_bytes = (2 if config.vocab_size <= 1 << 16 else 4) + (1 if sources.kind == "chat" else 0)
    weights = cost.total_params(config)
    exports = sum(_EXPORT_BITS[kind] / 8 for kind in recipe.export.types) * weights
    found = {
        "checkpoints": checkpoint_bytes(config, recipe) * kept_checkpoints(recipe, steps),
        "prepared rows": 0 if sources.is_prepared else sources.num_tokens * token_bytes,
        "download": sources.download_bytes,
        "averaged weights": 4 * weights if recipe.optim.ema_decay is not None else 0,
        "exports": round(exports),
    }
    if recipe.adapter.trunk_cache == "disk" and num_frozen_blocks(recipe, config):
        rows = facts.num_rows + facts.num_valid_rows
        found["kept trunk"] = kept_bytes(recipe, config, rows, facts.row_length)
    return {name: size for name, size in found.items() if size}


def bill(found: Estimate, hardware: Hardware, price_an_hour: float | None) -> dict[str, Any]:
    """Cost of the hours on all devices, and energy at their highest power; None where unknown."""
    hours = found.total_s / 3600
    energy = None if hardware.watts is None else hours * hardware.watts / 1000
    price = None if price_an_hour is None else hours * price_an_hour * hardware.count
    return {"hours": hours, "cost": price, "energy_kwh": energy}
