"""Machines by name, from what their makers publish: mule/plan/machines.json. No torch.

Nothing of it was measured here. What share of the published rates training reaches is assumed, and the
file says on what grounds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mule import fsio
from mule.config.hints import near
from mule.errors import UserError
from mule.plan.work import Speed

FILE = Path(__file__).with_name("machines.json")
_SEVERAL = re.compile(r"(?P<name>.+?)(?:x(?P<count>[1-9]\d?))?")
_GIGABYTES = re.compile(r"(?P<base>.+)-(?P<size>\d+)gb")


@dataclass(frozen=True)
class Named:
    """A named machine, or several like it. Memory is that of one device; `watts` of all together."""

    name: str
    count: int
    kind: str  # cuda, mps or cpu
    memory_bytes: int
    matmul_flops: dict[str, float]  # dense, by precision
    read_bytes_per_second: float
    link_bytes_per_second: float | None
    capability: tuple[int, int]
    cores: int
    watts: float | None
    source: str

    def speed(self, precision: str) -> Speed:
        """Of one of its devices, as published."""
        flops = self.matmul_flops
        fast = "bf16" if precision in ("fp16", "fp8") else precision
        return Speed(
            flops.get(fast, flops["fp32"]),
            flops.get("bf16", flops["fp32"]),
            self.read_bytes_per_second,
            assumed()[self.kind]["operation_s"],
            self.link_bytes_per_second or float("inf"),
        )


def named_machine(text: str) -> Named:
    """What `rtx4090`, `rtx4090x6` or `m4-24gb` means; UserError with the near names."""
    found = _SEVERAL.fullmatch(text.strip().lower())
    assert found is not None
    name, count = found["name"], int(found["count"] or 1)
    known = _file()["machines"]
    size = _GIGABYTES.fullmatch(name)
    key = name if name in known or size is None else size["base"]
    if key not in known:
        raise _unknown(text, names())
    raw = known[key]
    sizes = raw["memory_gb"]
    memory = int(size["size"]) if size and key != name else sizes[0]
    if memory not in sizes:
        raise _unknown(text, [f"{key}-{n}gb" for n in sizes])
    if count > 1 and raw["kind"] != "cuda":
        raise UserError(
            f"--machine {text}: {key} trains alone; several processes need CUDA devices",
            f"plan for one: --machine {name}",
        )
    watts = raw["watts"]
    return Named(
        name=name,
        count=count,
        kind=raw["kind"],
        memory_bytes=memory * (10**9 if raw.get("decimal") else 2**30),
        matmul_flops={kind: 1e12 * rate for kind, rate in raw["tflops"].items()},
        read_bytes_per_second=1e9 * raw["gb_per_s"],
        link_bytes_per_second=1e9 * raw["link_gb_per_s"] if "link_gb_per_s" in raw else None,
        capability=tuple(raw.get("capability", (0, 0))),
        cores=raw.get("cores", 8),
        watts=None if watts is None else count * watts,
        source=raw["source"],
    )


def names() -> list[str]:
    """Every name, with those of the sizes of memory that a machine is sold with."""
    found = []
    for name, raw in _file()["machines"].items():
        found.append(name)
        found += [f"{name}-{size}gb" for size in raw["memory_gb"]] if raw["kind"] == "mps" else []
    return found


def assumed() -> dict[str, Any]:
    """By kind of machine: how many times its ideal time each kind of work is taken to need."""
    return _file()["assumed"]


def grounds(kind: str) -> str:
    """Why so much is assumed of a kind of machine."""
    return assumed()["grounds"][kind]


def _unknown(text: str, known: list[str]) -> UserError:
    close = near(text.lower(), known)
    hint = f"did you mean {close}? " if close else ""
    return UserError(
        f"--machine {text}: not among the machines whose figures come with Mule",
        f"{hint}known: {', '.join(known)}; several of a GPU as {known[0]}x4",
    )


@cache
def _file() -> dict[str, Any]:
    return fsio.read_json(FILE)
