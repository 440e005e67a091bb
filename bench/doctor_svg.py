"""Two line charts side by side as a small SVG: a few kilobytes, the same bytes for the same curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 250
_PLOT_WIDTH, _PLOT_HEIGHT, _LEFT, _TOP, _GAP = 318, 180, 62, 28, 36
_GREY, _GRID = "#4a4a4a", "#e3e3e3"
_TEXT = '<text x="{:.0f}" y="{:.0f}" text-anchor="{}" {}>{}</text>'


@dataclass(frozen=True)
class Line:
    """A curve; `label` "" is not listed."""

    points: Sequence[tuple[float, float]]
    colour: str
    label: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A chart; `mark` is a place on its x axis with a few words."""

    title: str
    lines: Sequence[Line]
    x_end: float
    mark: tuple[float, str] | None = None


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    logarithmic: bool

    def place(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        return (at - low) / (high - low)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            every = max(1, (last - first + 4) // 5)
            return [10.0**power for power in range(first, last + 1, every)]
        return nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * number for number in range(first, math.floor(high / step + 1e-9) + 1)]


def drawing(panels: Sequence[Panel], label: str, *, logarithmic: bool = False) -> str:
    """The text of an SVG; the panels share the scale of their y axis."""
    values = [y for panel in panels for line in panel.lines for _, y in line.points]
    scale = _scale([v for v in values if math.isfinite(v)], logarithmic)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="11" fill="{_GREY}">'
    )
    body = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    middle = _TOP + _PLOT_HEIGHT / 2
    turned = f'transform="rotate(-90 14 {middle:.0f})"'
    body.append(_TEXT.format(14, middle, "middle", turned, escape(label)))
    for number, panel in enumerate(panels):
        left = _LEFT + number * (_PLOT_WIDTH + _GAP)
        body += _panel(panel, scale, left, with_numbers=number == 0)
    return "\n".join([head, *body, "</svg>"]) + "\n"


def _scale(values: Sequence[float], logarithmic: bool) -> _Scale:
    low, high = min(values), max(values)
    if logarithmic:
        low = max(low, 1e-12)
        return _Scale(low / 1.5, max(high, low * 10) * 1.5, True)
    margin = 0.06 * max(high - low, 0.02 * abs(high), 1e-9)
    return _Scale(max(0.0, low - margin) if low >= 0 else low - margin, high + margin, False)


def _panel(panel: Panel, scale: _Scale, left: float, *, with_numbers: bool) -> list[str]:
    right, bottom = left + _PLOT_WIDTH, _TOP + _PLOT_HEIGHT

    def x_of(x: float) -> float:
        return left + _PLOT_WIDTH * x / panel.x_end

    def y_of(y: float) -> float:
        return bottom - _PLOT_HEIGHT * min(1.0, max(0.0, scale.place(y)))

    made = [_TEXT.format((left + right) / 2, _TOP - 10, "middle", "", escape(panel.title))]
    for tick in scale.ticks():
        y = y_of(tick)
        made.append(f'<path d="M{left:.0f} {y:.1f}H{right:.0f}" stroke="{_GRID}"/>')
        if with_numbers:
            made.append(_TEXT.format(left - 6, y + 4, "end", "", _number(tick)))
    for tick in nice_ticks(0, panel.x_end):
        made.append(_TEXT.format(x_of(tick), bottom + 15, "middle", "", _number(tick)))
    made.append(_TEXT.format((left + right) / 2, bottom + 32, "middle", "", "updates"))
    frame = f'stroke="{_GREY}" fill="none"'
    made.append(f'<path d="M{left:.0f} {_TOP}V{bottom:.0f}H{right:.0f}" {frame}/>')
    for line in panel.lines:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        dashes = ' stroke-dasharray="5 3"' if line.dashed else ""
        drawn = f'stroke="{line.colour}" stroke-width="1.6" fill="none"{dashes}'
        made.append(f'<polyline points="{path}" {drawn}/>')
    for place, line in enumerate(line for line in panel.lines if line.label):
        y = _TOP + 12 + 15 * place
        text = _TEXT.format(right - 4, y, "end", f'style="fill:{line.colour}"', line.label)
        made.append(text)
    if panel.mark is not None:
        at, words = panel.mark
        x, side = x_of(at), "start" if at < 0.6 * panel.x_end else "end"
        dots = f'stroke="{_GREY}" stroke-dasharray="2 3"'
        made.append(f'<path d="M{x:.1f} {_TOP}V{bottom:.0f}" {dots}/>')
        made.append(_TEXT.format(x + (4 if side == "start" else -4), bottom - 6, side, "", words))
    return made


def _number(value: float) -> str:
    """As on an axis: 0.004, 2.5, 400, 12k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"
