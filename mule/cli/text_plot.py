"""A plot made of characters, for a terminal or a log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 66, 14
_LEFT_OUT = 0.1  # of the points, the first ones: the fall from the start would squeeze all else
_SHOWN_SHARE = 0.98  # of the others, the lowest ones: nor is a single spike worth the height


@dataclass(frozen=True)
class Line:
    """Points (x, y) drawn with one character; a later line covers an earlier one."""

    mark: str
    name: str
    points: Sequence[tuple[float, float]]


def text_plot(
    lines: Sequence[Line],
    *,
    width: int = _WIDTH,
    height: int = _HEIGHT,
    label: Callable[[float], str] = "{:.3f}".format,
) -> list[str]:
    """The lines of text, with both scales and a legend; empty without points.

    `width` and `height` are those of the plot itself, `label` writes the ends of its scale.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return []
    xs = [x for line in drawn for x, _ in line.points]
    first, last = min(xs), max(xs)
    shown = first + _LEFT_OUT * (last - first)
    ys = sorted(y for line in drawn for x, y in line.points if x >= shown)
    low, high = ys[0], ys[round(_SHOWN_SHARE * (len(ys) - 1))]
    grid = [[" "] * width for _ in range(height)]
    for line in drawn:
        for x, y in line.points:
            column = round((x - first) / max(last - first, 1e-12) * (width - 1))
            row = round((high - y) / max(high - low, 1e-12) * (height - 1))
            if 0 <= row < height:
                grid[row][column] = line.mark
    labels = {0: label(high), height - 1: label(low)}
    margin = max(map(len, labels.values()))
    rows = [
        f"{labels.get(place, ''):>{margin}} |{''.join(cells).rstrip()}"
        for place, cells in enumerate(grid)
    ]
    ends = f"{first:,.0f}", f"{last:,.0f}"
    axis = f"{'':>{margin}}  {ends[0]}{ends[1]:>{width - len(ends[0])}}"
    legend = "  ".join(f"{line.mark} {line.name}" for line in drawn)
    return [*rows, axis, f"{'':>{margin}}  {legend}"]
