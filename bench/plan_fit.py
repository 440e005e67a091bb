"""The constants of `mule plan`, fitted to measured runs; numbers only, no libraries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mule.plan.fitted import Fitted

_MEMORY = ("process", "compiling", "activations", "compiled_activations")
_MEMORY += ("bitsandbytes", "moments_in_8_bits")
_STEPS = (1.5, 1.15, 1.05, 1.01)  # by which a constant is tried larger and smaller
_ROUNDS = 40
_TOO_LITTLE, _LITTLE = 4.0, 0.03  # how much worse it is to predict less, beyond so much
_LEAST = 0.3  # times the ideal: a kind that is little of every run is not to be fitted away
_TRUST = 0.003  # how much a constant is held to what it was, beside one run's squared error


def fit_memory(samples: Sequence[Any], start: Fitted) -> dict[str, float]:
    """Those that make the mean absolute error of the logarithms smallest, one after the other.

    What is predicted much too low counts more: such a run might die.
    """

    def loss(memory: dict[str, float]) -> float:
        fitted = replace(start, memory=memory)
        errors = [
            math.log(sample.peak(fitted) / sample.measured["peak_bytes"]) for sample in samples
        ]
        return sum(abs(e) + _TOO_LITTLE * max(0.0, -e - _LITTLE) for e in errors) / len(errors)

    return _descend(start.memory, [name for name in _MEMORY if name in start.memory], loss)


def fit_time(samples: Sequence[Any], start: Fitted) -> dict[str, float]:
    """Factors of the kinds of work, none of them free, by relative least squares.

    Each is drawn a little to what it was, so that a kind that no run has keeps its value.
    """
    names = list(dict.fromkeys(name for sample in samples for name in sample.work))
    times = {**start.time, **{name: start.time.get(name, 1.0) for name in names}}
    shares = [
        {name: value / sample.measured["update_s"] for name, value in sample.work.items()}
        for sample in samples
    ]
    for _ in range(_ROUNDS * len(names)):
        for name in names:
            before = start.time.get(name, 1.0)
            pull = _TRUST / max(before, 1e-9) ** 2
            weight, wanted = pull, pull * before
            for share in shares:
                own = share.get(name, 0.0)
                rest = sum(times[other] * share[other] for other in share if other != name)
                weight += own * own
                wanted += own * (1.0 - rest)
            times[name] = max(_LEAST if name != "updates" else 0.0, wanted / weight)
    return {name: float(f"{value:.4g}") for name, value in times.items()}


def _descend(
    start: dict[str, float], names: Sequence[str], loss: Callable[[dict[str, float]], float]
) -> dict[str, float]:
    """One constant after the other, in ever smaller steps, while the loss falls."""
    best, lowest = dict(start), loss(start)
    for step in _STEPS:
        for _ in range(_ROUNDS):
            before = lowest
            for name in names:
                for factor in (step, 1 / step):
                    tried = {**best, name: best[name] * factor}
                    if (found := loss(tried)) < lowest:
                        best, lowest = tried, found
            if lowest == before:
                break
    return {name: float(f"{value:.4g}") for name, value in best.items()}
