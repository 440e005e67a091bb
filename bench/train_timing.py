"""What the ways of bench/train.py, sft.py and gpu.py share: the job, the memory and the times.

Each way runs in a process and an environment of its own, so nothing of Mule is imported here,
and torch where it is used: mlx-lm has none.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

AnyJob = TypeVar("AnyJob", bound="Job")
BETAS, WEIGHT_DECAY, LEARNING_RATE, MAX_GRAD_NORM = (0.9, 0.95), 0.1, 1e-4, 1.0


@dataclass(frozen=True)
class Job:
    """A shape and how much of it to train; an update is one micro-batch of `rows`."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    row_length: int
    rows: int
    warm_up: int  # updates before the timed ones; the first compiles
    timed: int
    threads: int
    precision: str = "bf16"  # of the arithmetic: bf16 or fp32; weights are fp32
    head_dim: int = 64


@dataclass(frozen=True, kw_only=True)
class RunJob(Job):
    """A job on the data and the tokenizer of a folder; `rows` make an update, in whatever parts."""

    folder: str
    device: str = "cpu"


def arguments(kind: type[AnyJob]) -> tuple[AnyJob, str]:
    """The arguments of a peer's script: the job as JSON, and which variant of the way."""
    return kind(**json.loads(sys.argv[1])), sys.argv[2]


def split(words: list[str]) -> tuple[list[str], dict[str, int]]:
    """The names among the words of a `run`, and its numbers: rounds=3, updates=4."""
    given = dict(word.split("=") for word in words if "=" in word)
    return [word for word in words if "=" not in word], {n: int(v) for n, v in given.items()}


def trainer_arguments(job: Job) -> dict[str, Any]:
    """What every peer that is a Trainer of transformers is told: the job, AdamW fused, no files."""
    import torch

    return {
        "max_steps": job.warm_up + job.timed,
        "per_device_train_batch_size": job.rows,
        "bf16": job.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "optim": "adamw_torch_fused",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def begin(job: Job) -> int:
    """Set the process up; the bytes it holds after its imports, from which memory is counted.

    The compiler's are among the imports, whether a way compiles or not.
    """
    import torch
    import torch._inductor.compile_fx

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    return memory_bytes("VmRSS")


def memory_bytes(field: str) -> int:
    """VmRSS, resident now, or VmHWM, the most so far, of this process alone.

    getrusage would count the parent too, whose memory a child holds until it starts its program.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def random_rows(job: Job) -> torch.Tensor:
    """Token ids (rows, row_length + 1), others at each call."""
    import torch

    return torch.randint(0, job.vocab_size, (job.rows, job.row_length + 1))


def time_updates(job: Job, update: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Seconds and losses of all updates of the job; `update` makes its batch and gives its loss."""
    seconds, losses = [], []
    for _ in range(job.warm_up + job.timed):
        started = time.perf_counter()
        losses.append(update())
        seconds.append(time.perf_counter() - started)
    return seconds, losses


def state_bytes(parameters: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Memory of fp32 weights and moments: what an update changes, of any way the same size."""
    import torch

    tensors = [*parameters, *(v for s in optimizer.state.values() for v in s.values())]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def figures(
    job: Job, seconds: list[float], losses: list[float], *, baseline: int, state: int
) -> dict[str, Any]:
    """What a way reports: times of updates, mean loss, memory above the imports (`baseline`)."""
    timed = seconds[job.warm_up :]
    return {
        "tokens_per_second": len(timed) * job.rows * job.row_length / sum(timed),
        "updates_s": timed,
        "first_update_s": seconds[0],
        "loss": sum(losses) / len(losses),
        "peak_bytes": memory_bytes("VmHWM") - baseline,
        "state_bytes": state,
        "baseline_bytes": baseline,
    }


def gpu_figures(job: RunJob, seconds: list[float], losses: list[float]) -> dict[str, Any]:
    """What a way on a GPU reports: times of updates, mean loss, the most memory tensors took."""
    import torch

    timed = seconds[job.warm_up :]
    cuda = job.device == "cuda"
    return {
        "tokens_per_second": len(timed) * job.rows * job.row_length / sum(timed),
        "updates_s": timed,
        "first_update_s": seconds[0],
        "loss": sum(losses) / len(losses),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
    }


def targets_per_second(job: Job, seconds: list[float], targets: list[int]) -> float:
    """Trained tokens a second over the timed updates, given those of each update."""
    return sum(targets[job.warm_up :]) / sum(seconds[job.warm_up :])


def versions(*packages: str) -> dict[str, str]:
    """Versions of what this environment measured with."""
    return {name: importlib.metadata.version(name) for name in ("torch", *packages)}
