"""The report's plots as SVG: lines with bands, intervals, bars, heat maps.

Written here because a page without scripts, in light and dark, read by screen readers and drawn
without an extra dependency, is what the report needs and no drawing library gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from mule.lab.plot_axes import Axis, Scale, scale_for, tick_texts
from mule.lab.plot_style import NUM_COLOURS, ink_on, shade, style_sheet

_WIDTH = 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 12.0, 10.0, 42.0
_PLOT_HEIGHT = 210.0
_LEGEND_ROW = 19.0
_ROW = 26.0  # of an interval or a bar
_MAX_POINTS = 300  # of a line: more are not seen, and make a large file
_WIDTHS = {**{c: 12.0 for c in "mwMW"}, **{c: 5.6 for c in "iljtfr.,:;-1 "}}  # of letters
_CELLS_WITH_TEXT = 12  # columns of a heat map that leave room for numbers


@dataclass(frozen=True)
class Figure:
    """A picture: file name without ending, title, what it shows in words, `<svg>` element."""

    name: str
    title: str
    description: str
    svg: str

    def file_text(self) -> str:
        """The picture as a file of its own."""
        head, tail = self.svg.split(">", 1)
        return f"{head}><style>{style_sheet()}</style>{tail}\n"


@dataclass(frozen=True)
class Line:
    """Points of one variant, and the band around them; `style` is the variant's place."""

    name: str
    style: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    marks: bool = False


@dataclass(frozen=True)
class Bar:
    """A value with its confidence interval, or none; `style` is the variant's place."""

    name: str
    style: int
    value: float
    half_width: float | None = None


@dataclass(frozen=True)
class Cells:
    """The values of a heat map, row by row, and the names of rows and columns."""

    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]


def line_plot(
    name: str, title: str, told: str, lines: Sequence[Line], axes: tuple[Axis, Axis]
) -> Figure:
    """Lines over an x axis and a y axis, with a legend below."""
    legend = _legend([(line.name, line.style) for line in lines], _TOP + _PLOT_HEIGHT + _BOTTOM + 6)
    x = scale_for(axes[0], (v for line in lines for v in line.x), _LEFT, _WIDTH - _RIGHT)
    seen = [
        v for line in lines for v in (*line.y, *line.low, *line.high) if not axes[1].log or v > 0
    ]
    y = scale_for(axes[1], seen, _TOP + _PLOT_HEIGHT, _TOP)
    clip = f"{name}-area"
    parts = [
        f'<clipPath id="{clip}"><rect x="{_LEFT:g}" y="{_TOP:g}" '
        f'width="{_WIDTH - _LEFT - _RIGHT:g}" height="{_PLOT_HEIGHT:g}"/></clipPath>',
        *_grid(x, y, axes),
        f'<g clip-path="url(#{clip})">',
        *(part for line in lines for part in _band(line, x, y)),
        *(part for line in lines for part in _curve(line, x, y)),
        "</g>",
        *legend.parts,
    ]
    height = _TOP + _PLOT_HEIGHT + _BOTTOM + legend.height + 6
    return _figure(name, title, told, parts, height)


def interval_plot(
    name: str, title: str, told: str, bars: Sequence[Bar], axis: Axis, *, from_zero: bool = False
) -> Figure:
    """One row each: a point with its interval, or with `from_zero` a bar with its error."""
    left = min(196.0, 16 + max(_wide(bar.name) for bar in bars))
    ends = [v for bar in bars for v in _ends(bar)] + ([0.0] if from_zero else [])
    axis = Axis(axis.label, low=0.0 if from_zero else None)
    bottom = _TOP + _ROW * len(bars)
    x = scale_for(axis, ends, left, _WIDTH - _RIGHT)
    parts = _vertical_grid(x, _TOP, bottom, axis.label)
    if x.low < 0 < x.high:
        parts.append(_stroke("zero", x(0), _TOP, x(0), bottom))
    for place, bar in enumerate(bars):
        middle = _TOP + _ROW * (place + 0.5)
        parts.append(_text(left - 8, middle + 4, _cut(bar.name, left), "end"))
        colour = bar.style % NUM_COLOURS
        if from_zero:
            wide = x(bar.value) - x(0)
            parts.append(
                f'<rect class="f{colour}" x="{x(0):.1f}" y="{middle - 8:.1f}" '
                f'width="{max(wide, 0.5):.1f}" height="16" opacity=".75"/>'
            )
        parts += _error_bar(bar, x, middle, "zero" if from_zero else f"s{colour}")
        if not from_zero:
            parts.append(_mark(bar.style, x(bar.value), middle))
    return _figure(name, title, told, parts, bottom + _BOTTOM)


def heat_map(
    name: str,
    title: str,
    told: str,
    cells: Cells,
    labels: tuple[str, str, str],
    *,
    low: float = 0.0,
    high: float | None = None,
) -> Figure:
    """Cells from `low`, dark, to `high`, bright; a ring marks one that is exactly 0.

    `labels` name what the columns are, what the rows are, and the value.
    """
    values, rows, columns = cells.values, cells.rows, cells.columns
    top = high if high is not None else max((v for row in values for v in row), default=1.0)
    limits = (low, top if top > low else low + 1.0)
    left = 30 + max(_wide(row) for row in rows)
    wide = (_WIDTH - left - _RIGHT) / len(columns)
    tall = min(26.0, max(9.0, 220.0 / len(rows)))
    parts: list[str] = []
    with_text = len(columns) <= _CELLS_WITH_TEXT and tall >= 14
    for place, row in enumerate(values):
        y = _TOP + place * tall
        parts.append(_text(left - 6, y + tall / 2 + 4, rows[place], "end small"))
        for column, value in enumerate(row):
            box = (left + column * wide, y, wide, tall)
            parts += _cell(value, limits, box, with_text)
    bottom = _TOP + tall * len(values)
    every = max(1, math.ceil(len(columns) * (max(map(_wide, columns)) + 8) / 330))
    for column in range(0, len(columns), every):
        parts.append(
            _text(left + (column + 0.5) * wide, bottom + 14, columns[column], "middle small")
        )
    middle = (left + _WIDTH - _RIGHT) / 2
    parts.append(_text(middle, bottom + 30, labels[0], "middle faint"))
    parts.append(_turned(11, (_TOP + bottom) / 2, labels[1]))
    parts += _colour_bar(left, bottom + 42, limits, labels[2])
    return _figure(name, title, told, parts, bottom + 82)


# ---------------------------------------------------------------- parts of a plot


@dataclass(frozen=True)
class _Legend:
    parts: list[str]
    height: float


def _legend(names: Sequence[tuple[str, int]], top: float) -> _Legend:
    """Line samples with names, in as many rows as they need; none for a single line."""
    if len(names) < 2:
        return _Legend([], 0)
    parts, x, y = [], 12.0, top
    for name, style in names:
        wide = 34 + _wide(name) + 14
        if x + wide > _WIDTH and x > 12:
            x, y = 12.0, y + _LEGEND_ROW
        parts.append(
            f'<path class="line {_style(style)}" d="M{x:.1f} {y:.1f}h28"/>'
            + _mark(style, x + 14, y)
            + _text(x + 34, y + 4, name)
        )
        x += wide
    return _Legend(parts, y - top + _LEGEND_ROW)


def _grid(x: Scale, y: Scale, axes: tuple[Axis, Axis]) -> list[str]:
    bottom = _TOP + _PLOT_HEIGHT
    parts = _vertical_grid(x, _TOP, bottom, axes[0].label)
    ticks = y.ticks()
    for tick, text in zip(ticks, tick_texts(ticks)):
        parts.append(_stroke("grid", _LEFT, y(tick), _WIDTH - _RIGHT, y(tick)))
        parts.append(_text(_LEFT - 6, y(tick) + 4, text, "end small"))
    parts.append(_turned(11, _TOP + _PLOT_HEIGHT / 2, axes[1].label))
    return parts


def _vertical_grid(x: Scale, top: float, bottom: float, label: str) -> list[str]:
    ticks = x.ticks(4)
    parts = [_stroke("axis", x.start, bottom, x.end, bottom)]
    for tick, text in zip(ticks, tick_texts(ticks)):
        parts.append(_stroke("grid", x(tick), top, x(tick), bottom))
        parts.append(_text(x(tick), bottom + 15, text, "middle small"))
    middle = min((x.start + x.end) / 2, _WIDTH - 4 - _wide(label) / 2)  # whole at the right edge
    parts.append(_text(middle, bottom + 32, label, "middle faint"))
    return parts


def _curve(line: Line, x: Scale, y: Scale) -> Iterable[str]:
    points = [(a, b) for a, b in zip(line.x, line.y) if not y.log or b > 0]
    yield f'<path class="line {_style(line.style)}" d="{_path(points, x, y)}"/>'
    marked = points if line.marks else points[-1:]
    yield "".join(_mark(line.style, x(a), y(b)) for a, b in marked)


def _band(line: Line, x: Scale, y: Scale) -> Iterable[str]:
    if not line.low or (y.log and min(line.low) <= 0):
        return
    there = _path(list(zip(line.x, line.high)), x, y)
    back = _path(list(zip(line.x, line.low))[::-1], x, y).replace("M", "L", 1)
    yield f'<path class="band f{line.style % NUM_COLOURS}" d="{there}{back}Z"/>'


def _path(points: list[tuple[float, float]], x: Scale, y: Scale) -> str:
    stride = -(-len(points) // _MAX_POINTS) or 1
    kept = points[::stride]
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    moves = (f"{x(a):.1f} {y(b):.1f}" for a, b in kept)
    return "M" + "L".join(moves) if kept else ""


def _error_bar(bar: Bar, x: Scale, middle: float, colour: str) -> list[str]:
    if bar.half_width is None:
        return []
    low, high = x(bar.value - bar.half_width), x(bar.value + bar.half_width)
    ends = f"M{low:.1f} {middle - 5:.1f}v10M{high:.1f} {middle - 5:.1f}v10"
    return [f'<path class="error {colour}" d="M{low:.1f} {middle:.1f}H{high:.1f}{ends}"/>']


def _ends(bar: Bar) -> tuple[float, float]:
    return bar.value - (bar.half_width or 0), bar.value + (bar.half_width or 0)


def _cell(
    value: float,
    limits: tuple[float, float],
    box: tuple[float, float, float, float],
    with_text: bool,
) -> list[str]:
    x, y, wide, tall = box
    share = (value - limits[0]) / (limits[1] - limits[0])
    area = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.2f}" height="{tall:.2f}"'
    parts = [f'<rect {area} fill="{shade(share)}"/>']
    if value == 0:
        radius = min(wide, tall) / 3
        at = f'cx="{x + wide / 2:.1f}" cy="{y + tall / 2:.1f}"'
        parts.append(f'<circle {at} r="{radius:.1f}" fill="none" stroke="#ffffff"/>')
    elif with_text:
        place = f'x="{x + wide / 2:.1f}" y="{y + tall / 2 + 4:.1f}"'
        ink = f'style="fill:{ink_on(share)}"'
        parts.append(f'<text class="middle small" {place} {ink}>{value:.2f}</text>')
    return parts


def _colour_bar(left: float, y: float, limits: tuple[float, float], label: str) -> list[str]:
    steps, wide = 24, 150.0
    parts = [
        f'<rect x="{left + place * wide / steps:.1f}" y="{y:.1f}" width="{wide / steps + 0.3:.2f}" '
        f'height="9" fill="{shade((place + 0.5) / steps)}"/>'
        for place in range(steps)
    ]
    parts.append(_text(left, y + 22, f"{limits[0]:.3g}", "small"))
    parts.append(_text(left + wide, y + 22, f"{limits[1]:.3g}", "end small"))
    parts.append(_text(left + wide + 10, y + 9, label, "faint small"))
    return parts


def _figure(name: str, title: str, told: str, parts: Iterable[str], height: float) -> Figure:
    svg = (
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height:.0f}" '
        f'role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(told)}</desc>'
        f'<rect class="page" width="100%" height="100%"/>{"".join(parts)}</svg>'
    )
    return Figure(name, title, told, svg)


def _style(style: int) -> str:
    return f"s{style % NUM_COLOURS} d{style % NUM_COLOURS}"


def _mark(style: int, x: float, y: float) -> str:
    """A circle, square, triangle or diamond: variants differ in more than colour."""
    fill = f'class="f{style % NUM_COLOURS}"'
    shapes = (
        f'<circle {fill} cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>',
        f'<rect {fill} x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4"/>',
        f'<path {fill} d="M{x:.1f} {y - 4.3:.1f}l4.2 7.4h-8.4z"/>',
        f'<path {fill} d="M{x:.1f} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z"/>',
    )
    return shapes[style % len(shapes)]


def _stroke(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _turned(x: float, y: float, text: str) -> str:
    turn = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"'
    return f'<text class="middle faint" {turn}>{escape(text)}</text>'


def _cut(name: str, width: float) -> str:
    while len(name) > 1 and _wide(name) > width - 15:
        name = f"{name.removesuffix('…')[:-1]}…"
    return name


def _wide(text: str) -> float:
    """About how wide a text is: a little more than most fonts need."""
    return sum(_WIDTHS.get(letter, 7.6) for letter in text)
