"""The few measured constants of `mule plan`: mule/plan/fitted.json, written by bench/plan.py. No torch.

`memory`: bytes of a process beside its tensors, and how much more than its closed form activations
take. `time`: how many times its ideal time each kind of work takes (mule/plan/work.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mule import fsio

FILE = Path(__file__).with_name("fitted.json")


@dataclass(frozen=True)
class Fitted:
    """The constants, with the machine and the runs that they were fitted on."""

    memory: dict[str, float]
    time: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict)


@cache
def fitted() -> Fitted:
    """As they come with Mule."""
    raw = fsio.read_json(FILE)
    return Fitted(raw["memory"], raw["time"], raw["about"])
