"""Speed and memory of a run."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mule.train.distributed import Group

_WINDOW_STEPS = 20  # rates are means over this many updates
_THREADS = Path("/proc/self/task")  # of Linux, each with a file schedstat


class Clock(NamedTuple):
    """A moment: seconds, and how long each thread has waited for a core until then.

    The latter is empty where the system does not tell.
    """

    now_s: float
    waited_s: dict[str, float]

    @classmethod
    def read(cls) -> Clock:
        """This moment."""
        return cls(time.perf_counter(), _waited_s())

    def since(self, before: Clock) -> tuple[float, float]:
        """(seconds between the two, those of them that a thread waited for a core: the longest)."""
        waits = (s - before.waited_s.get(name, s) for name, s in self.waited_s.items())
        passed_s = self.now_s - before.now_s
        return passed_s, min(max(waits, default=0.0), passed_s)


class Meter:
    """Rates over the last updates, and the totals of this attempt."""

    def __init__(self, flops_per_token: float | None, peak_flops: float) -> None:
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._window: deque[tuple[float, int, float]] = deque(maxlen=_WINDOW_STEPS)
        self.num_tokens = 0
        self.train_s = 0.0
        self._first_s = 0.0  # the first update compiles and touches fresh memory
        self._first_tokens = 0
        self._first_wait_s = 0.0

    def add(self, began: Clock, num_tokens: int) -> None:
        """Count one update, which ends now."""
        duration_s, wait_s = Clock.read().since(began)
        if not self.num_tokens:
            self._first_s, self._first_tokens, self._first_wait_s = duration_s, num_tokens, wait_s
        else:
            self._window.append((duration_s, num_tokens, wait_s))
        self.num_tokens += num_tokens
        self.train_s += duration_s

    def rates(self) -> dict[str, float | None]:
        """tokens_per_second, steps_per_second and share_of_peak over the window.

        The latter is None where it is not known what a token costs.

        With them core_wait_share: the share of the time that was lost because others had the cores.
        """
        window = self._window or [(self._first_s, self._first_tokens, self._first_wait_s)]
        seconds = sum(s for s, _, _ in window)
        rates = self._rates(sum(n for _, n, _ in window), len(window), seconds)
        return rates | {"core_wait_share": sum(w for _, _, w in window) / max(seconds, 1e-9)}

    def overall(self) -> dict[str, float | None]:
        """The same over the whole attempt, without its first update."""
        tokens, seconds = self.num_tokens - self._first_tokens, self.train_s - self._first_s
        if tokens == 0:
            tokens, seconds = self.num_tokens, self.train_s
        return self._rates(tokens, 1, max(seconds, 1e-9))

    def _rates(self, tokens: int, steps: int, seconds: float) -> dict[str, float | None]:
        per_second, flops = tokens / seconds, self._flops_per_token
        return {
            "tokens_per_second": per_second,
            "steps_per_second": steps / seconds,
            "share_of_peak": None if flops is None else per_second * flops / self._peak_flops,
        }


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, or of the GPU where there is one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return _peak_resident_bytes()


def memory_now_bytes() -> int | None:
    """Resident memory of this process, or what tensors hold of the GPU where there is one; None
    where the system tells peaks only."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    file = Path("/proc/self/statm")
    if not file.exists():
        return None
    return int(file.read_text().split()[1]) * resource.getpagesize()


def device_memory(device: torch.device) -> dict[str, int]:
    """What this process has used of its device, in bytes.

    Active is what tensors hold and freed blocks still in use by the GPU, allocated the tensors,
    reserved what is kept from the driver. A CPU knows resident memory only, an Apple GPU no peaks.
    """
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        kinds = {"active": "active_bytes", "allocated": "allocated_bytes"}
        kinds["reserved"] = "reserved_bytes"
        return {f"peak_{name}_bytes": stats[f"{key}.all.peak"] for name, key in kinds.items()}
    if device.type == "mps":
        return {
            "allocated_bytes": torch.mps.current_allocated_memory(),
            "driver_bytes": torch.mps.driver_allocated_memory(),
        }
    return {"peak_resident_bytes": _peak_resident_bytes()}


def memory_of_all(
    group: Group, device: torch.device, micro_batch_rows: int
) -> list[dict[str, Any]]:
    """One row for each process: its device, what it used of it, and its rows at once."""
    own = device_memory(device) | {"micro_batch_rows": micro_batch_rows}
    if group.is_alone:
        return [{"device": device.type, **own}]
    table = torch.zeros(group.world_size, len(own), dtype=torch.float64, device=device)
    table[group.rank] = torch.tensor(list(own.values()), dtype=torch.float64)
    group.sum_(table)
    return [
        {"device": f"{device.type} {rank}", **dict(zip(own, map(round, row)))}
        for rank, row in enumerate(table.tolist())
    ]


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _waited_s() -> dict[str, float]:
    """How long each thread of this process has waited for a core; what ended meanwhile is left out.

    The second number of schedstat, in ns: Documentation/scheduler/sched-stats.rst of Linux.
    """
    found = {}
    for thread in _THREADS.glob("*/schedstat"):
        try:
            found[thread.parent.name] = int(thread.read_text().split()[1]) * 1e-9
        except (OSError, IndexError):
            continue
    return found
