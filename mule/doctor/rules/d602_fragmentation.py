"""Fragmented GPU memory.

What it sees: what is reserved from the driver beyond what is active (`devices` of the evaluations, CUDA
only) grows at nearly every evaluation, to more than a fifth of the reserved memory, while what is
active does not grow with it.
Why it matters: free memory lies in pieces too small to use. The run dies of "out of memory" with memory
to spare, usually at the longest batch or in an evaluation.
What to do: start it with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment; rows of
one length fragment less (data.packing=true).
Source: PyTorch's notes on CUDA memory management (expandable_segments); active_bytes and reserved_bytes
of torch.cuda.memory_stats.
"""

from __future__ import annotations

import itertools

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.message import Message

_FEWEST, _RISING = 5, 0.7
_SHARE, _GREW = 0.2, 0.1  # of what is reserved


def _check(history: History) -> Found | None:
    found = []
    for step, devices in history.pick("devices", of_attempt=history.newest_attempt):
        if devices and "peak_reserved_bytes" in devices[0]:
            reserved, active = (devices[0][f"peak_{kind}_bytes"] for kind in ("reserved", "active"))
            found.append((step, reserved, reserved - active))
    if len(found) < _FEWEST:
        return None
    gaps = [gap for _, _, gap in found]
    reserved = found[-1][1]
    rises = sum(later > before for before, later in itertools.pairwise(gaps))
    grew = gaps[-1] - gaps[0]
    is_rising = rises >= _RISING * (len(gaps) - 1) and grew >= _GREW * reserved
    if not is_rising or gaps[-1] < _SHARE * reserved:
        return None
    return Found(
        "warning",
        found[0][0],
        Message(
            "{:.1f} of {:.1f} GiB are reserved and not in use, "
            "{:.1f} at update {}: the memory is fragmented",
            gaps[-1] / 2**30,
            reserved / 2**30,
            gaps[0] / 2**30,
            found[0][0],
        ),
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True mule train ... --resume",
        {"reserved": reserved, "gap": gaps[-1], "first_gap": gaps[0]},
    )


RULE = Rule("D602", "memory fragmented", _check, needs=("devices",))
