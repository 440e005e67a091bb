"""The peer of bench/gpu.py: a training step on a GPU, as nanochat makes one, in plain PyTorch.

The Llama of bench/train_plain.py, compiled whole, fp32 weights under bf16 autocast, flash attention
through SDPA, fused AdamW; an update of many micro-batches on ids that are on the device already,
with no loader, log or checkpoint. Of the sizes of a micro-batch in ROWS_AT_ONCE the fastest counts.
nanochat's own optimizer is Muon and AdamW; here it is AdamW alone, as in the run beside it.
Arguments: JOB VARIANT. Prints one line of JSON.
"""

from __future__ import annotations

import json
import time

import torch
from train_plain import Llama
from train_timing import (
    BETAS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    RunJob,
    arguments,
    begin,
    gpu_figures,
    random_rows,
    time_updates,
    versions,
)

ROWS_AT_ONCE = (64, 32)  # 32 rows of 2,048 tokens are nanochat's own
_PROBES = 3  # micro-batches timed of each size, after one that compiles


class Step:
    """The model, its optimizer, and an update in micro-batches of `rows`."""

    def __init__(self, job: RunJob, rows: int) -> None:
        self.job, self.rows = job, rows
        with torch.device(job.device):
            self.model = Llama(job)
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
        self.compiled = torch.compile(self.model, dynamic=False)

    def update(self) -> float:
        parts = random_rows(self.job).to(self.job.device).split(self.rows)
        total = torch.zeros((), device=self.job.device)
        for rows in parts:
            total += self.backward(rows) / len(parts)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()  # waits for the device

    def backward(self, rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.job.device, dtype=torch.bfloat16):
            loss = self.compiled(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        (loss * (len(rows) / self.job.rows)).backward()
        return loss.detach()


def main() -> None:
    job, _ = arguments(RunJob)
    begin(job)
    torch.set_float32_matmul_precision("high")
    sizes = [rows for rows in ROWS_AT_ONCE if rows <= job.rows] or [job.rows]
    rows = min(sizes, key=lambda rows: _seconds_a_row(job, rows))
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = time_updates(job, Step(job, rows).update)
    found = gpu_figures(job, seconds, losses)
    print(json.dumps({**found, "rows_at_once": rows, "versions": versions()}))


def _seconds_a_row(job: RunJob, rows: int) -> float:
    """What a row takes in micro-batches of so many; infinite when they do not fit."""
    try:
        step, ids = Step(job, rows), random_rows(job)[:rows].to(job.device)
        step.backward(ids).item()
        started = time.perf_counter()
        for _ in range(_PROBES):
            step.backward(ids)
        step.backward(ids).item()
        return (time.perf_counter() - started) / (_PROBES + 1) / rows
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        torch.compiler.reset()
        if job.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
