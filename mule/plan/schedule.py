"""Learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from mule.config.schema import OptimSection


def learning_rate(optim: OptimSection, warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """The learning rate of update `step` (from 0), after a linear warm-up.

    The last update of the warm-up has the highest rate. The lowest is that of the update after the
    last, so that no update is wasted on a rate of 0. The decay of wsd begins no sooner than the
    warm-up ends. Sources: cosine, Loshchilov and Hutter 2017, equation 5; WSD, Hu et al. 2024
    (MiniCPM), section 4.2.
    """
    peak, floor = float(optim.learning_rate), optim.min_learning_rate
    after_warmup = num_steps - warmup_steps
    decay_steps = max(1, min(round(optim.decay_share * num_steps), after_warmup))

    def falling(step: int) -> float:
        """From 1 after the warm-up to 0 at the end of the run."""
        share = (step - warmup_steps) / max(1, after_warmup)
        match optim.schedule:
            case "constant":
                return 1.0
            case "wsd":
                return min(1.0, (num_steps - step) / decay_steps)
            case "linear":
                return 1 - share
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * share))

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        return floor + (peak - floor) * falling(step)

    return rate
