"""The curves of a run for a chart: of a range of updates, with no more points than can be seen."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mule.commands.columns import AXES, Axis, Column, Columns
from mule.errors import UserError

MAX_POINTS = 2000  # of a trace
_SMOOTHED_OVER = 50  # the line is a running mean over 1/50 of the run, unless told otherwise
_FEW = 200  # so many values of a figure that is not in each row are drawn with marks
_DIGITS = 7  # significant ones: more are not seen
_HOUR_S = 3600
_EVENTS = ("rolled back", "micro-batch halved", "goal reached", "stopped early")


@dataclass(frozen=True)
class Chart:
    """One picture: its figures with their names, the first the one it is about.

    Values are multiplied by `scale` to be in `unit`. `is_noisy` asks for a running mean.
    """

    name: str
    title: str
    unit: str
    figures: dict[str, str]
    scale: float = 1.0
    is_noisy: bool = False


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "nats a token",
        {
            "loss": "training",
            "val_loss": "validation",
            "val_loss_ema": "validation, averaged weights",
        },
        is_noisy=True,
    ),
    Chart("learning_rate", "Learning rate", "", {"learning_rate": "learning rate"}),
    Chart("grad_norm", "Gradient norm", "", {"grad_norm": "gradient norm"}, is_noisy=True),
    Chart(
        "tokens_per_second",
        "Speed",
        "tokens a second",
        {"tokens_per_second": "tokens a second"},
        is_noisy=True,
    ),
    Chart(
        "memory",
        "Memory",
        "GiB",
        {"memory_bytes": "highest so far", "memory_now_bytes": "in use"},
        scale=2.0**-30,
    ),
    Chart(
        "share_of_peak",
        "Share of the machine's peak (MFU)",
        "%",
        {"share_of_peak": "share of peak"},
        scale=100.0,
        is_noisy=True,
    ),
)


def curves(
    columns: Columns,
    *,
    by: str = "steps",
    first: float | None = None,
    last: float | None = None,
    smooth: int | None = None,
    max_points: int = MAX_POINTS,
) -> dict[str, Any]:
    """Every chart of the range from `first` to `last` on the axis `by`; the whole run without.

    `smooth` is the window of the running means in updates. A trace has at most `max_points` points:
    of each part of the range the lowest and the highest value, so that no spike is lost.
    """
    axis, points = _axis(by), max(4, min(max_points, MAX_POINTS))
    window = max(1, smooth if smooth is not None else len(columns) // _SMOOTHED_OVER)
    scale = _HOUR_S if axis == "hours" else 1
    x = columns.along(axis)
    whole = [x[0] / scale, x[-1] / scale] if len(columns) else [0.0, 0.0]
    low, high = (
        (given if given is not None else end) * scale for given, end in zip((first, last), whole)
    )
    view = _View(columns, axis, (low, high), window, points)
    return {
        "run": columns.run.name,
        "by": axis,
        "axis": AXES[axis],
        "updates": len(columns),
        "whole": [_short(value) for value in whole],
        "window": window,
        "charts": [found for chart in CHARTS if (found := view.drawn(chart))],
    }


@dataclass(frozen=True)
class _View:
    """What is looked at: a range of an axis, in the unit of `Columns.along`."""

    columns: Columns
    axis: Axis
    range: tuple[float, float]
    window: int
    max_points: int

    def drawn(self, chart: Chart) -> dict[str, Any] | None:
        """The traces of a chart, and figures for who cannot see them; None where nothing is."""
        traces, told = [], None
        for name, label in self._figures(chart).items():
            column = self.columns.figures.get(name)
            if column is None:
                continue
            first, end = self._places(column)
            if told is None and first < end:
                told = _told(column.values[first:end], chart.scale)
            if self.window > 1 and chart.is_noisy and name == next(iter(chart.figures)):
                traces.append(self._trace(column, chart, name, label, "raw"))
                traces.append(self._trace(column, chart, name, f"{label}, mean", "mean"))
            else:
                traces.append(self._trace(column, chart, name, label, "line"))
        if not traces:
            return None
        head = {"name": chart.name, "title": chart.title, "unit": chart.unit}
        return {**head, "told": told, "traces": traces}

    def _figures(self, chart: Chart) -> dict[str, str]:
        """With the losses of each source, where there are several."""
        if chart.name != "loss":
            return chart.figures
        parts = [name for name in self.columns.figures if name.startswith("val_loss_by")]
        return chart.figures | {name: name.partition(".")[2] for name in parts}

    def _places(self, column: Column) -> tuple[int, int]:
        """The values within the range, and one on either side, so that lines go to the edges."""
        x = self.columns.along(self.axis)
        low = bisect_left(x, self.range[0])
        high = bisect_right(x, self.range[1])
        first, end = bisect_left(column.rows, low), bisect_left(column.rows, high)
        return max(0, first - 1), min(len(column.rows), end + 1)

    def _trace(
        self, column: Column, chart: Chart, name: str, label: str, kind: str
    ) -> dict[str, Any]:
        first, end = self._places(column)
        is_mean = kind == "mean"
        values = column.means(first, end, self.window) if is_mean else column.values[first:end]
        kept = extremes(values, self.max_points)
        x, rows = self.columns.along(self.axis), column.rows
        scale = 1 / _HOUR_S if self.axis == "hours" else 1.0
        if end - first <= _FEW and 2 * len(column) < len(self.columns):
            kind = "points"
        return {
            "figure": name,
            "label": label,
            "kind": kind,
            "x": [_short(x[rows[first + place]] * scale) for place in kept],
            "y": [_short(values[place] * chart.scale) for place in kept],
        }


def extremes(values: Sequence[float], max_points: int) -> Sequence[int]:
    """The places of at most `max_points` values that draw the same curve: the ends, and of each part
    of equal length the lowest and the highest."""
    count = len(values)
    if count <= max_points:
        return range(count)
    parts = max_points // 2 - 1
    kept = [0]
    for part in range(parts):
        start, end = 1 + part * (count - 2) // parts, 1 + (part + 1) * (count - 2) // parts
        chunk = values[start:end]
        low, high = (start + chunk.index(pick(chunk)) for pick in (min, max))
        kept += [low] if low == high else [low, high] if low < high else [high, low]
    return [*kept, count - 1]


# ---------------------------------------------------------------- what is pinned on them


def marks(
    columns: Columns, findings: Sequence[dict[str, Any]], *, by: str = "steps"
) -> dict[str, Any]:
    """Where on the charts the doctor's findings and the run's events lie.

    A finding is pinned on the curve that its rule reads, at the update where it began.
    """
    axis = _axis(by)
    if not len(columns):
        return {"findings": [], "events": []}
    starts = [e for e in columns.run.events() if e["kind"] == "started" and e["attempt"] > 1]
    events = [*starts, *columns.run.standing_events(*_EVENTS)]
    return {
        "findings": [_pinned(columns, finding, axis) for finding in findings],
        "events": [
            {
                "kind": "resumed" if event["kind"] == "started" else event["kind"],
                "step": _step_of(event),
                "x": _position(columns, _step_of(event), axis),
            }
            for event in events
        ],
    }


def _step_of(event: dict[str, Any]) -> int:
    return event.get("step", event.get("from_step", 0))


def _pinned(columns: Columns, finding: dict[str, Any], axis: Axis) -> dict[str, Any]:
    chart, name = _chart_of(finding["code"])
    column = columns.figures.get(name)
    place = columns.place_of(finding["step"])
    told = {key: finding[key] for key in ("code", "title", "severity", "step")}
    at: dict[str, Any] = {
        "chart": chart.name,
        "x": _position(columns, finding["step"], axis),
        "y": None,
    }
    if column is not None:
        index = min(bisect_left(column.rows, place), len(column) - 1)
        window = max(1, len(columns) // _SMOOTHED_OVER) if chart.is_noisy else 1
        at["y"] = _short(column.means(index, index + 1, window)[0] * chart.scale)
    return told | at


def _chart_of(code: str) -> tuple[Chart, str]:
    """The chart of the figure that a rule needs beside the loss, else of the loss; that figure."""
    from mule.doctor.rules import all_rules

    needs = next((rule.needs for rule in all_rules() if rule.code == code), ())
    for name in [*(name for name in needs if name != "loss"), "loss"]:
        for chart in CHARTS:
            if name in chart.figures:
                # A validation is rare: the pin stands on the curve that is everywhere.
                return chart, next(iter(chart.figures))
    raise AssertionError("the loss has a chart")


# ---------------------------------------------------------------- the forecast


def band(columns: Columns, found: dict[str, Any], *, by: str = "steps") -> dict[str, Any]:
    """What `mule.commands.forecast` expects, as lines and bands of 80% for the chart of the loss."""
    axis = _axis(by)
    lines: dict[str, Any] = {}
    for figure, label in (("loss", "training"), ("val_loss", "validation")):
        rows = [row for row in found["forecast"] if row["figure"] == figure]
        path = found["path"].get(figure) or []
        if rows and path:
            now = (found["step"], path[0][1])
            lines[figure] = {
                "label": label,
                "x": [_position(columns, step, axis) for step, _ in path],
                "expected": [_short(loss) for _, loss in path],
                "at": [_position(columns, s, axis) for s in (now[0], *(r["step"] for r in rows))],
                "low": [_short(v) for v in (now[1], *(row["low"] for row in rows))],
                "high": [_short(v) for v in (now[1], *(row["high"] for row in rows))],
            }
    return {"lines": lines, "cannot": found["cannot"], "basis": found["basis"] if lines else ""}


# ---------------------------------------------------------------- inside


def _axis(by: str) -> Axis:
    for axis in AXES:
        if axis == by:
            return axis
    raise UserError(f"there is no axis `{by}`", f"one of {', '.join(AXES)}")


def _position(columns: Columns, step: int, axis: Axis) -> float:
    """In the unit that is shown."""
    x = columns.position(step, axis)
    return _short(x / _HOUR_S if axis == "hours" else x)


def _told(values: Sequence[float], scale: float) -> dict[str, float]:
    """First, last, lowest and highest value."""
    picked = {"first": values[0], "last": values[-1], "lowest": min(values), "highest": max(values)}
    return {name: _short(value * scale) for name, value in picked.items()}


def _short(value: float) -> float:
    """With as many digits as a chart can show; whole numbers stay so."""
    if value == 0 or not math.isfinite(value):
        return 0.0
    if value == int(value):
        return int(value)
    return float(f"{value:.{_DIGITS}g}")
