"""What the metrics of a finished run say of its training: speed, memory, stability."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from mule.run import Run

SPIKE_WINDOW = 20  # updates before, which a spike is measured against
_NOISES, _LEAST_NATS = 6.0, 0.1
_TO_SIGMA = 1.4826  # times the median absolute deviation: a standard deviation, of normal values
_RECENT = 20  # the reported training loss is the mean over these


def training_figures(run: Run) -> dict[str, Any]:
    """Of the run's rows and events.

    tokens_per_second and share_of_peak are medians over the run's updates (each row is a mean over
    20), without the first, which compiles; losses in nats a token; gradient norms before clipping.
    The share is None where it is not known what a token costs.
    """
    rows = run.metrics()
    steady = rows[1:] or rows
    losses = [row["loss"] for row in rows]
    norms = [row["grad_norm"] for row in rows if row.get("grad_norm") is not None]
    shares = [row["share_of_peak"] for row in steady if row["share_of_peak"] is not None]
    return {
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steady),
        "share_of_peak": statistics.median(shares) if shares else None,
        "peak_memory_bytes": max(row["memory_bytes"] for row in rows),
        "final_loss": statistics.fmean(losses[-_RECENT:]),
        "max_grad_norm": max(norms, default=None),
        "mean_grad_norm": statistics.fmean(norms) if norms else None,
        "num_spikes": len(spikes(losses)),
        "refused_updates": len(run.standing_events("update refused")),
    }


def spikes(losses: Sequence[float]) -> list[int]:
    """The places of loss spikes: where an update's loss jumps above those just before it.

    A spike is a loss above the median of the 20 before by more than 6 times their noise, and by at
    least 0.1 nats. Noise is the robust standard deviation (1.4826 times the median absolute
    deviation) of the steps from one update to the next over the root of 2: a falling loss does not
    add to it. What is as high within 20 updates of a spike belongs to it. The first 20 have none.
    """
    found: list[int] = []
    for place in range(SPIKE_WINDOW, len(losses)):
        window = losses[place - SPIKE_WINDOW : place]
        middle = statistics.median(window)
        is_high = losses[place] - middle > max(_NOISES * _noise(window), _LEAST_NATS)
        if is_high and not (found and place - found[-1] < SPIKE_WINDOW):
            found.append(place)
    return found


def _noise(losses: Sequence[float]) -> float:
    """The standard deviation of independent noise on a smooth course of losses."""
    steps = [after - before for before, after in itertools.pairwise(losses)]
    middle = statistics.median(steps)
    return _TO_SIGMA * statistics.median(abs(step - middle) for step in steps) / math.sqrt(2)


def trained_seconds(run: Run) -> float:
    """Wall seconds from the start of each attempt to its last update, stops left out."""
    events = [event for event in run.events() if event["kind"] == "started"]
    rows = run.metrics()
    total = 0.0
    for event in events:
        own = [row["at"] for row in rows if row["attempt"] == event["attempt"]]
        total += max(0.0, max(own) - event["at"]) if own else 0.0
    return total
