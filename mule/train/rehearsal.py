"""Before the first update: what could end the run later is tried, so that it ends in the first minute.

The fullest micro-batch forward and backward, an evaluation's first batch, and the space for all
checkpoints that the run will keep. Weights, moments, random numbers and data are as before: the run
computes the same bits with it and without.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from mule import fsio, machine, progress
from mule.data.shards import Shards
from mule.evaluate.loss import held_out_loss
from mule.models.own_model import OwnModel, unchanged_buffers
from mule.plan import memory
from mule.plan.estimate import MARGIN, kept_checkpoints
from mule.run import Run
from mule.train.checkpoint import checkpoint_bytes
from mule.train.meter import peak_memory_bytes
from mule.train.out_of_memory import free_memory

if TYPE_CHECKING:
    from mule.train.assemble import Parts

REHEARSED, LEFT_OUT = "rehearsed", "rehearsal left out"  # the events
_SHARE_OF_FREE = 0.5  # a run that needs less of what is free by estimate runs no risk


class Cutter(Protocol):
    """Who cuts updates into micro-batches, and may cut them smaller where memory runs out."""

    rows_at_once: int

    def may_halve(self, error: Exception) -> bool: ...
    def halve(self, step: int) -> None: ...


def rehearse(run: Run, parts: Parts, cutter: Cutter) -> None:
    """Try it once in a run, and say what was found; where nothing can happen it is left out.

    Raises StorageError when the disk is too small, and what is raised where memory runs out for one
    row; for several, the cutter takes half of them.
    """
    if parts.group.from_first(lambda: _is_done(run)):
        return
    parts.group.from_first(lambda: _require_space(run, parts))
    if why := parts.group.from_first(lambda: _why_not(parts, cutter.rows_at_once)):
        run.log_event(LEFT_OUT, cause=why)
        return
    while True:
        try:
            progress.note(tried(run, parts, cutter.rows_at_once).words)
            return
        except (RuntimeError, MemoryError) as error:
            if not cutter.may_halve(error):
                raise
        cutter.halve(0)  # when the exception is gone, and with it the tensors it held


@dataclass(frozen=True)
class Tried:
    """What trying took, in bytes at the most and in words."""

    peak_bytes: int
    words: str


def tried(run: Run, parts: Parts, rows_at_once: int) -> Tried:
    """Try the fullest rows and an evaluation now, whatever the estimate says."""
    began = time.perf_counter()
    devices = [parts.model.device] if parts.model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        unchanged_buffers(parts.model),
        progress.task("Trying the fullest rows", total=None),
    ):
        _pass(parts, rows_at_once)
        if parts.valid is not None:
            held_out_loss(parts.model, islice(parts.valid, 1), len(parts.valid.labels))
    free_memory()
    seconds, peak = time.perf_counter() - began, peak_memory_bytes()
    run.log_event(REHEARSED, rows=rows_at_once, seconds=seconds, memory_bytes=peak)
    return Tried(
        peak,
        f"tried the {rows_at_once} fullest rows, an evaluation and the space for checkpoints in "
        f"{seconds:.1f} s: {peak / 2**30:,.2f} GiB at the most so far",
    )


def fullest_rows(shards: Shards, count: int) -> np.ndarray:
    """The rows that take most: of chats the one with the longest, then those with most targets."""
    if shards.kind != "chat":
        return np.arange(min(count, shards.num_rows))
    targets = np.concatenate([_targets(part) for part in shards.parts])
    most = np.argsort(-targets, kind="stable")
    # Rows are packed the longest chat first: the first row of each part has it.
    rows = [0, *most[most != 0].tolist()]
    return np.array(rows[: min(count, shards.num_rows)], dtype=np.int64)


def _targets(part: Any) -> np.ndarray:
    """Trained tokens of each row (num_rows,)."""
    sums = np.concatenate(([0], np.cumsum(part.trained, dtype=np.int64)))
    of_example = sums[part.offsets[1:]] - sums[part.offsets[:-1]]
    return np.add.reduceat(of_example[part.order], part.rows[:-1])


def _pass(parts: Parts, rows_at_once: int) -> None:
    """Forward and backward, whose gradients are thrown away."""
    rows = fullest_rows(parts.train.shards, rows_at_once)
    batch = parts.train.batch(rows).to(parts.model.device)
    try:
        scale = parts.scaler.factor if parts.scaler else 1.0
        parts.model.nll_sum(batch, grad_scale=scale).backward()
    finally:
        parts.optimizer.zero_grad()


def _is_done(run: Run) -> bool:
    """Whether an earlier attempt tried it, or made an update."""
    return any(event["kind"] == REHEARSED for event in run.events()) or bool(run.metrics())


def _require_space(run: Run, parts: Parts) -> None:
    kept = kept_checkpoints(parts.recipe, parts.resolved.num_steps)
    fsio.require_space(
        run.folder, checkpoint_bytes(parts) * kept, f"{kept} checkpoints that the run will hold"
    )


def _why_not(parts: Parts, rows_at_once: int) -> str | None:
    """Why trying is not worth its time, or cannot be done; None when it is to be done."""
    recipe = parts.recipe
    if parts.is_sharded:
        return "the processes of a sharded run compute together"
    if recipe.adapter.engine == "mlx":
        return "mlx computes, and tells of memory itself"
    if isinstance(parts.model, OwnModel):
        return None  # nothing is known of what its activations take
    shards = parts.train.shards
    mask = memory.mask_length(
        parts.config, recipe.train, shards.row_length, isolated=shards.isolated
    )
    kind = str(recipe.train.activation_checkpointing)
    tokens = rows_at_once * shards.row_length
    needed = tokens * memory.activation_bytes_per_token(
        parts.config, recipe.train, kind, mask, recipe.adapter
    )
    head_trained = recipe.adapter.kind == "none"
    precision = str(recipe.train.precision)
    needed += memory.loss_bytes(parts.config, precision, head_trained=head_trained)
    needed += sum(memory.state_bytes(parts.config, recipe, accumulates=True).values())
    free = _free_bytes(parts.model.device)
    if needed * (1 + MARGIN) > _SHARE_OF_FREE * free:
        return None
    mib = 2**20
    return f"by estimate it needs {needed / mib:,.0f} MiB, and {free / mib:,.0f} MiB are free"


def _free_bytes(device: torch.device) -> int:
    """Beside what the process holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine.available_bytes()
