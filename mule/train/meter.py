"""Speed and memory of a run."""

from __future__ import annotations

import resource
import sys
from collections import deque

import torch

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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
