"""Memory that grows without end.

What it sees: memory in use, or its peak where only that is known, goes up all along the later two
thirds of the run: in most of twenty stretches its lowest figure is a new height, and the growth is a
twentieth of the level and 32 MiB at least. Caches fill and compiled graphs come in steps, and then end:
a healthy run has its growth early, in a few places.
Why it matters: the run ends with "out of memory" in the night; on a machine with swap it gets slower
first.
What to do: see what is kept from update to update (tensors with their graph, lists of losses); meanwhile
checkpoint.every_steps makes sure that little is lost: a resumed run starts with fresh memory.
Source: records of a stationary series come ever more rarely (log n of n values; Renyi 1962); a leak's
come all the time.
"""

from __future__ import annotations

import itertools

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History, Series, series_of
from mule.message import Message

_FEWEST_UPDATES = 40
_STRETCHES, _RISING = 20, 0.75
_LEAST_SHARE, _LEAST_BYTES = 0.05, 32 * 2**20


def _check(history: History) -> Found | None:
    memory = _of_this_attempt(history)
    later = signals.parts(memory, 3)[1:]
    if len(memory) < _FEWEST_UPDATES:
        return None
    values = [value for part in later for value in part.values]
    count = min(_STRETCHES, len(values) // 2)
    ends = [round(place * len(values) / count) for place in range(count + 1)]
    lows = [min(values[a:b]) for a, b in itertools.pairwise(ends)]
    records = sum(b > max(lows[: place + 1]) for place, b in enumerate(lows[1:]))
    growth = lows[-1] - lows[0]
    enough = growth >= max(_LEAST_BYTES, _LEAST_SHARE * lows[0])
    if records < _RISING * (count - 1) or not enough or not _goes_on(lows):
        return None
    span = later[-1].steps[-1] - later[0].steps[0]
    an_update = growth / max(1, span * (count - 1) / count)
    every = max(1, span // 4)
    return Found(
        "warning",
        later[0].steps[0],
        Message(
            "memory grows all the time: {:,.0f} to {:,.0f} MiB since "
            "update {}, {:.2f} MiB an update",
            lows[0] / 2**20,
            lows[-1] / 2**20,
            later[0].steps[0],
            an_update / 2**20,
        ),
        Message(
            "checkpoint.every_steps={}, and resume before memory is full; what the code keeps "
            "from update to update is the cause",
            every,
        ),
        {"bytes_an_update": an_update, "first": lows[0], "last": lows[-1]},
    )


def _goes_on(lows: list[float]) -> bool:
    """Whether the second half grew as the first did, and not ever less."""
    middle = len(lows) // 2
    return lows[-1] - lows[middle] > 0.5 * (lows[middle] - lows[0])


def _of_this_attempt(history: History) -> Series:
    """A resumed run is another process, with fresh memory."""
    name = "memory_now_bytes" if history.rows[-1].get("memory_now_bytes") else "memory_bytes"
    return series_of(history.pick(name, of_attempt=history.newest_attempt))


RULE = Rule("D601", "memory growing", _check, needs=("memory_bytes",))
