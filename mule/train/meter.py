"""Speed and memory of a run."""

from __future__ import annotations

import resource
import sys
from collections import deque
from typing import Any

import torch

from mule.train.distributed import Group

_WINDOW_STEPS = 20  # rates are means over this many updates


class Meter:
    """Rates over the last updates, and the totals of this attempt."""

    def __init__(self, flops_per_token: float, peak_flops: float) -> None:
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._window: deque[tuple[float, int]] = deque(maxlen=_WINDOW_STEPS)
        self.num_tokens = 0
        self.train_s = 0.0
        self._first_s = 0.0  # the first update compiles and touches fresh memory
        self._first_tokens = 0

    def add(self, duration_s: float, num_tokens: int) -> None:
        """Count one update."""
        if not self.num_tokens:
            self._first_s, self._first_tokens = duration_s, num_tokens
        else:
            self._window.append((duration_s, num_tokens))
        self.num_tokens += num_tokens
        self.train_s += duration_s

    def rates(self) -> dict[str, float]:
        """tokens_per_second, steps_per_second and share_of_peak over the window."""
        window = self._window or [(self._first_s, self._first_tokens)]
        seconds = sum(s for s, _ in window)
        return self._rates(sum(n for _, n in window), len(window), seconds)

    def overall(self) -> dict[str, float]:
        """The same over the whole attempt, without its first update."""
        tokens, seconds = self.num_tokens - self._first_tokens, self.train_s - self._first_s
        if tokens == 0:
            tokens, seconds = self.num_tokens, self.train_s
        return self._rates(tokens, 1, max(seconds, 1e-9))

    def _rates(self, tokens: int, steps: int, seconds: float) -> dict[str, float]:
        per_second = tokens / seconds
        return {
            "tokens_per_second": per_second,
            "steps_per_second": steps / seconds,
            "share_of_peak": per_second * self._flops_per_token / self._peak_flops,
        }


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, or of the GPU where there is one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return _peak_resident_bytes()


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
