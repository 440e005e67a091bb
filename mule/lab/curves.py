"""What the logs of an arm's runs say over time: losses, gradients, routing; over its seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from mule.lab.records import Arm, Result
from mule.run import Run

Row = dict[str, Any]
# What a row's `moe` says of each layer, and how the report calls it.
ROUTING = {
    "max_violation": "MaxVio",
    "dropped": "share dropped",
    "rerouted": "share re-routed",
    "entropy": "router entropy",
    "confidence": "router confidence",
    "aux_loss": "auxiliary loss",
    "z_loss": "z-loss",
    "bias_range": "range of the bias",
}
LAST_SHARE = 0.25  # of a run: what is said of routing "at the end" is over this part


@dataclass(frozen=True)
class Curve:
    """The mean over seeds at each place, and the lowest and highest seed."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    num_seeds: int


@dataclass(frozen=True)
class Routing:
    """Of one run: its mixture layers, and the rows that tell of them, with the share of the run."""

    layers: list[int]
    rows: list[tuple[float, Row]]  # (tokens seen, `moe` of a row)
    num_tokens: float

    def at_end(self) -> list[Row]:
        """The rows of the last part of the run, at least one."""
        after = (1 - LAST_SHARE) * self.num_tokens
        return [row for tokens, row in self.rows if tokens > after] or [self.rows[-1][1]]

    def figures(self, name: str) -> list[list[float]] | None:
        """A figure of each row and layer, (rows, layers); None where a row lacks it."""
        found = [row.get(name) for _, row in self.rows]
        whole = all(_is_row_of_numbers(values, len(self.layers)) for values in found)
        return [[float(v) for v in values or []] for values in found] if whole else None

    def figures_at_end(self, name: str) -> list[list[float]] | None:
        """Those of the rows of the last part."""
        found = self.figures(name)
        return None if found is None else found[-len(self.at_end()) :]

    def tokens_per_expert(self) -> list[list[float]]:
        """Of the last part: tokens of each layer and expert, (layers, E)."""
        counts = [row["tokens_per_expert"] for row in self.at_end()]
        return [
            [float(sum(column)) for column in zip(*(of_row[place] for of_row in counts))]
            for place in range(len(self.layers))
        ]


def rows_of(result: Result) -> list[Row]:
    """The logged updates of a run with `tokens` and `wall_s`; empty when the run is not there."""
    if result.run is None:
        return []
    run = Run(result.run)
    rows = [row for row in run.metrics() if row.get("loss") is not None]
    per_step = result.record["tokens"] / max(result.record["steps"], 1)
    seconds = _wall_seconds(rows, run.events())
    return [
        {**row, "tokens": row["step"] * per_step, "wall_s": wall}
        for row, wall in zip(rows, seconds)
    ]


def curve(rows: Sequence[Sequence[Row]], name: str, by: str = "tokens") -> Curve | None:
    """A figure of the rows of several seeds, at the updates that all have."""
    tables = [{row["step"]: row for row in own if row.get(name) is not None} for own in rows]
    tables = [table for table in tables if table]
    if not tables:
        return None
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    if not steps:
        return None
    places = [[table[step] for table in tables] for step in steps]
    values = [[row[name] for row in place] for place in places]
    return Curve(
        [fmean(row[by] for row in place) for place in places],
        [fmean(of_place) for of_place in values],
        [min(of_place) for of_place in values],
        [max(of_place) for of_place in values],
        len(tables),
    )


def routing_of(rows: Iterable[Row]) -> Routing | None:
    """What a run's rows say of its experts; None when they say nothing."""
    kept = [row for row in rows]
    told = [(row["tokens"], row["moe"]) for row in kept if _has_counts(row.get("moe"))]
    if not told:
        return None
    return Routing(list(told[0][1]["layers"]), told, kept[-1]["tokens"])


def rows_of_arm(arm: Arm) -> list[list[Row]]:
    """The rows of each seed whose run is there."""
    return [rows for result in arm.results if (rows := rows_of(result))]


def _wall_seconds(rows: list[Row], events: list[Row]) -> list[float]:
    """Seconds of training, evaluation and compiling before each row; pauses between attempts apart."""
    starts = {e["attempt"]: e["at"] for e in events if e.get("kind") == "started"}
    if not rows:
        return []
    total = rows[0]["at"] - starts.get(rows[0]["attempt"], rows[0]["at"])
    seconds = [total]
    for before, row in pairwise(rows):
        resumed = row["attempt"] != before["attempt"]
        begun = starts.get(row["attempt"], before["at"]) if resumed else before["at"]
        total += max(0.0, row["at"] - begun)
        seconds.append(total)
    return seconds


def _has_counts(moe: Any) -> bool:
    return isinstance(moe, dict) and bool(moe.get("layers")) and bool(moe.get("tokens_per_expert"))


def _is_row_of_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )
