"""Learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from mule.config.schema import OptimSection


def learning_rate(optim: OptimSection, warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """The learning rate of update `step` (from 0), after a linear warm-up.

    Sources: cosine, Loshchilov and Hutter 2017, equation 5; WSD, Hu et al. 2024 (MiniCPM), 4.2.
    """
    peak, floor = optim.learning_rate, optim.min_learning_rate
    decay_steps = max(1, round(optim.decay_share * num_steps))

    def falling(step: int) -> float:
        """From 1 after the warm-up to 0 at the end of the run."""
        if optim.schedule == "constant":
            return 1.0
        if optim.schedule == "wsd":
            return min(1.0, (num_steps - step) / decay_steps)
        share = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        if optim.schedule == "linear":
            return 1 - share
        return 0.5 * (1 + math.cos(math.pi * share))

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        return floor + (peak - floor) * max(0.0, falling(step))

    return rate
