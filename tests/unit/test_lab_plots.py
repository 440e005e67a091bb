"""The report's plots: marks of axes, unusual values, names that are too long."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from mule.lab.plot_axes import Axis, Scale, scale_for, tick_texts
from mule.lab.plot_style import NUM_COLOURS, ink_on, shade, style_sheet
from mule.lab.plots import Bar, Cells, Figure, Line, heat_map, interval_plot, line_plot


@pytest.mark.parametrize(
    ("ticks", "texts"),
    [
        ([3.9, 3.95, 4.0], ["3.90", "3.95", "4.00"]),
        ([0, 2e6, 4e6], ["0", "2M", "4M"]),
        ([0, 2.5e6, 5e6], ["0.0", "2.5M", "5.0M"]),
        ([200, 500, 1000, 2000], ["200", "500", "1000", "2000"]),
        ([-0.05, 0.0, 0.05], ["-0.05", "0.00", "0.05"]),
        ([0.0001, 0.0002], ["0.0001", "0.0002"]),
        ([1.0, 100.0, 1e4, 1e6], ["1", "100", "10000", "1e+06"]),
        ([], []),
    ],
)
def test_marks_are_written_alike(ticks: list[float], texts: list[str]) -> None:
    assert tick_texts(ticks) == texts


@pytest.mark.parametrize("low", [0.0, -3.1, 4.02, 1e-6, 7.3e6])
@pytest.mark.parametrize("span", [1e-4, 0.013, 1.0, 4.2e9])
def test_every_even_axis_has_a_few_round_marks_inside(low: float, span: float) -> None:
    ticks = Scale(low, low + span, 0, 100).ticks()
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.9), (3, 50), (1, 1e6), (128, 4096)])
def test_every_log_axis_has_marks_inside(low: float, high: float) -> None:
    ticks = Scale(low, high, 0, 100, log=True).ticks()
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)


def test_an_axis_of_one_value_or_none_has_room() -> None:
    for values in ([], [5.0], [0.0], [-2.0, -2.0]):
        scale = scale_for(Axis("x"), values, 0, 100)
        assert scale.low < scale.high
        assert all(0 < scale(value) < 100 for value in values)
    assert scale_for(Axis("x", low=0), [8.0, 9.0], 0, 100)(0) == 0
    assert scale_for(Axis("x", log=True), [8.0], 0, 100)(8.0) == pytest.approx(50)


def _parsed(figure: Figure) -> ElementTree.Element:
    assert "nan" not in figure.svg.lower().replace(figure.description.lower(), "")
    ElementTree.fromstring(figure.file_text())
    return ElementTree.fromstring(figure.svg)


def _texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter() if element.tag.endswith("}text")]


def test_lines_of_one_point_and_of_thousands() -> None:
    many = [float(place) for place in range(5000)]
    lines = [
        Line("one", 0, [3.0], [1.0]),
        Line("many", 1, many, many, [v - 1 for v in many], [v + 1 for v in many]),
        Line("a <name> & more", 9, [0.0, 1.0], [2.0, 3.0], marks=True),
    ]
    figure = line_plot("f", "Title", "What it shows.", lines, (Axis("x"), Axis("y")))
    root = _parsed(figure)
    assert {"one", "many", "a <name> & more", "x", "y"} <= set(_texts(root))
    longest = max(re.findall(r' d="([^"]*)"', figure.svg), key=len)
    assert longest.count("L") < 700  # thinned: both edges of the band
    alone = line_plot("g", "Title", "What it shows.", lines[:1], (Axis("x"), Axis("y")))
    assert "one" not in _texts(_parsed(alone))  # a legend of one line says nothing


def test_values_that_a_log_axis_cannot_show_are_left_out() -> None:
    line = Line("a", 0, [1.0, 10.0, 100.0], [0.0, 1.0, 2.0])
    _parsed(line_plot("f", "T", "Told.", [line], (Axis("x", log=True), Axis("y", log=True))))


def test_bars_and_intervals() -> None:
    bars = [Bar("a variant with a name that is far too long", 0, 3.0), Bar("b", 1, 5.0, 1.0)]
    for from_zero in (False, True):
        root = _parsed(interval_plot("f", "T", "Told.", bars, Axis("x"), from_zero=from_zero))
        assert any(text.startswith("a variant") and text.endswith("…") for text in _texts(root))


def test_a_heat_map_rings_what_is_zero_and_writes_numbers_where_they_fit() -> None:
    labels = ("expert", "layer", "load")
    small = heat_map("f", "T", "Told.", Cells([[0.0, 1.0], [2.0, 1.0]], "ab", "xy"), labels)
    root = _parsed(small)
    assert small.svg.count("<circle") == 1
    assert {"1.00", "2.00"} <= set(_texts(root))
    wide = Cells([[1.0] * 64 for _ in range(40)], ["l"] * 40, [str(n) for n in range(64)])
    texts = _texts(_parsed(heat_map("f", "T", "Told.", wide, labels)))
    assert "1.00" not in texts
    flat = heat_map("f", "T", "Told.", Cells([[0.5, 0.5]], "a", "xy"), labels, low=0.5)
    _parsed(flat)


def test_colours_can_be_told_apart_and_read() -> None:
    sheet = style_sheet()
    light, dark = sheet.split("@media (prefers-color-scheme:dark)")[0], sheet
    for place in range(NUM_COLOURS):
        assert f".s{place}{{stroke:#" in light
        assert dark.count(f".s{place}{{stroke:#") == 3  # light, dark, print
    light_of = [_luminance(shade(step / 20)) for step in range(21)]
    assert light_of == sorted(light_of)  # order is seen without colour too
    for step in range(21):
        share = step / 20
        assert _contrast(shade(share), ink_on(share)) >= 3


@pytest.mark.parametrize(("theme", "page"), [(0, "#ffffff"), (1, "#1d2126")])
def test_lines_stand_out_from_the_page(theme: int, page: str) -> None:
    colours = re.findall(r"\.s\d\{stroke:(#[0-9a-f]{6})\}", style_sheet())
    for colour in colours[theme * NUM_COLOURS : (theme + 1) * NUM_COLOURS]:
        assert _contrast(colour, page) >= 3, colour


def _luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    flat = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * flat[0] + 0.7152 * flat[1] + 0.0722 * flat[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)
