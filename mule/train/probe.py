"""A short trial before a long run: which micro-batch size is fastest here."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from mule import progress
from mule.batch import Batch
from mule.data.loader import Loader
from mule.models.decoder import Decoder
from mule.plan.micro_batch import TIMED_PASSES, is_worth
from mule.train.optim import Optimizer
from mule.train.out_of_memory import free_memory, is_out_of_memory


def measured_rates(
    model: Decoder, optimizer: Optimizer, loader: Loader, sizes: Sequence[int]
) -> list[tuple[int, float]]:
    """(rows, tokens/s) of forward and backward passes over real rows, for rising `sizes`.

    Ends where a size is not worth its memory, or does not fit: then it is not in the result. Weights,
    moments, random numbers and the order of the data are as before; gradients are zero.
    """
    device = next(model.parameters()).device
    rates: list[tuple[int, float]] = []
    devices = [device] if device.type == "cuda" else []
    description = "Trying micro-batch sizes"
    with torch.random.fork_rng(devices), progress.task(description, total=len(sizes)) as bar:
        for rows in sizes:
            batch = loader.batch(loader.rows_for_step(0)[:rows]).to(device)
            seconds = _best_seconds(model, optimizer, batch)
            if seconds is None:
                free_memory()
                break
            rates.append((rows, rows * loader.shards.row_length / seconds))
            bar.advance(1, rows=rows, tokens_per_second=rates[-1][1])
            if len(rates) > 1 and not is_worth(rates[-1][1], max(rate for _, rate in rates[:-1])):
                break
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the run's own peak is what counts
    return rates


def _best_seconds(model: Decoder, optimizer: Optimizer, batch: Batch) -> float | None:
    """The fastest of a few forward and backward passes; None when memory runs out."""
    best = float("inf")
    try:
        for _ in range(TIMED_PASSES):
            started_at = time.perf_counter()
            nll = model.nll_sum(batch)
            nll.backward()
            float(nll.detach())
            _wait_for(batch.targets.device)
            best = min(best, time.perf_counter() - started_at)
            optimizer.zero_grad()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        optimizer.zero_grad()
        return None
    return best


def _wait_for(device: torch.device) -> None:
    """Return when the device has done all it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
