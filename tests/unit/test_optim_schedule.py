"""The learning rate, against the closed form of its paper, and at both ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from mule.config.schema import OptimSection
from mule.plan.schedule import learning_rate

PEAK, FLOOR, WARMUP, STEPS = 0.1, 0.02, 10, 110


def rate_of(schedule: str, *, warmup: int = WARMUP, steps: int = STEPS, **more: Any) -> Any:
    floor = {} if schedule == "constant" else {"min_learning_rate": FLOOR}
    section = OptimSection.model_validate(
        {"learning_rate": PEAK, "schedule": schedule, **floor, **more}
    )
    return learning_rate(section, warmup, steps)


def cosine(step: int) -> float:
    """Loshchilov and Hutter 2017, equation 5, with T_cur and T_i counted after the warm-up."""
    share = (step - WARMUP) / (STEPS - WARMUP)
    return FLOOR + 0.5 * (PEAK - FLOOR) * (1 + math.cos(share * math.pi))


def wsd(step: int) -> float:
    """Hu et al. 2024, section 4.2: flat up to T, then f(step - T), here a straight line."""
    stable_until = STEPS - 22
    if step < stable_until:
        return PEAK
    return PEAK + (FLOOR - PEAK) * (step - stable_until) / (STEPS - stable_until)


def linear(step: int) -> float:
    return PEAK + (FLOOR - PEAK) * (step - WARMUP) / (STEPS - WARMUP)


FORMS = {"cosine": cosine, "wsd": wsd, "linear": linear, "constant": lambda step: PEAK}


@pytest.mark.parametrize("schedule", FORMS)
def test_each_update_has_the_rate_of_the_closed_form(schedule: str) -> None:
    rate, form = rate_of(schedule), FORMS[schedule]
    for step in range(STEPS):
        expected = PEAK * (step + 1) / WARMUP if step < WARMUP else form(step)
        assert rate(step) == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("schedule", FORMS)
@pytest.mark.parametrize(
    ("warmup", "steps"), [(0, 1), (0, 2), (1, 2), (1, 3), (4, 5), (10, 110), (60, 61), (90, 100)]
)
def test_both_ends(schedule: str, warmup: int, steps: int) -> None:
    rate = rate_of(schedule, warmup=warmup, steps=steps)
    rates = [rate(step) for step in range(steps)]
    assert rates[0] == pytest.approx(PEAK / max(warmup, 1))
    assert max(rates) == rates[max(warmup - 1, 0)] == pytest.approx(PEAK)
    assert rates[warmup] == pytest.approx(PEAK)  # the first after the warm-up starts at the top
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if schedule == "constant":
        assert rates[-1] == rate(steps) == PEAK
    else:
        assert rates[-1] > FLOOR  # every update moves
        assert rate(steps) == pytest.approx(FLOOR, abs=1e-15)


@pytest.mark.parametrize("schedule", FORMS)
def test_the_floor_is_zero_unless_given(schedule: str) -> None:
    rate: Callable[[int], float] = learning_rate(
        OptimSection.model_validate({"learning_rate": PEAK, "schedule": schedule}), 3, 20
    )
    assert all(rate(step) > 0 for step in range(20))
    assert rate(20) == pytest.approx(PEAK if schedule == "constant" else 0, abs=1e-15)


def test_wsd_decays_for_its_share_and_not_before_the_warm_up_ends() -> None:
    whole = rate_of("wsd", decay_share=0.5, warmup=10, steps=100)
    assert whole(50) == pytest.approx(PEAK) and whole(51) < PEAK
    assert whole(75) == pytest.approx((PEAK + FLOOR) / 2)
    # Half of the run is warm-up: what is left decays, from the top.
    short = rate_of("wsd", decay_share=0.9, warmup=50, steps=100)
    assert short(49) == short(50) == pytest.approx(PEAK)
    assert short(75) == pytest.approx((PEAK + FLOOR) / 2)
    # A decay shorter than one update is none: the last update has the highest rate.
    none = rate_of("wsd", decay_share=0.001, warmup=10, steps=100)
    assert none(99) == pytest.approx(PEAK)
