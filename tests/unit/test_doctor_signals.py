"""Statistics of noisy figures: what they find in curves whose truth is known."""

from __future__ import annotations

import math
import random

import pytest

from mule.doctor import signals
from mule.doctor.history import Series


def _series(values: list[float]) -> Series:
    return Series(list(range(1, len(values) + 1)), values)


def _noisy(count: int, level: float = 0.0, slope: float = 0.0, seed: int = 0) -> Series:
    rng = random.Random(seed)
    return _series([level + slope * place + rng.gauss(0, 1) for place in range(count)])


def test_the_middle_is_not_moved_by_outliers() -> None:
    values = [*_noisy(400).values, 1e9, 1e9]
    assert signals.median(values) == pytest.approx(0, abs=0.15)
    assert signals.quantile([1.0, 2.0, 3.0], 0.25) == 1.5
    assert math.isnan(signals.median([]))


@pytest.mark.parametrize("slope", [0.0, 0.05, -0.2])
def test_noise_is_that_of_single_values_whatever_the_trend(slope: float) -> None:
    assert signals.noise(_noisy(600, slope=slope).values) == pytest.approx(1, abs=0.15)


def test_a_trend_is_found_and_none_is_invented() -> None:
    line = signals.trend(_noisy(300, slope=-0.02))
    assert line.slope == pytest.approx(-0.02, abs=0.003)
    assert line.errors < -6
    assert line.first - line.last == pytest.approx(6, abs=0.9)
    beyond = [abs(signals.trend(_noisy(300, seed=seed)).errors) > 3.5 for seed in range(60)]
    assert sum(beyond) <= 1


def test_few_values_have_no_error_and_no_trend() -> None:
    assert signals.trend(_series([])).errors == 0
    assert signals.trend(_series([3.0, 1.0])).errors == 0


def test_parts_and_stretches() -> None:
    series = _series([float(place) for place in range(10)])
    assert [len(part) for part in signals.parts(series, 4)] == [2, 3, 3, 2]
    assert signals.between(series, 3, 5).values == [2.0, 3.0, 4.0]
    assert len(signals.between(series, 20, 30)) == 0
    assert signals.thinned(series, 5).values == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert signals.thinned(_series([])).values == []
    assert signals.smoothed(series, 3).values[:4] == [0.0, 0.5, 1.0, 2.0]
