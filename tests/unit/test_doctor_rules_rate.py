"""The doctor's rules about the learning rate and its schedule, D301 to D305."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mule.doctor.finding import ALL_KINDS
from mule.doctor.rules import d301_rate_too_high as too_high
from mule.doctor.rules import d302_rate_too_low as too_low
from mule.doctor.rules import d303_warmup_too_short as too_short
from mule.doctor.rules import d304_warmup_too_long as too_long
from mule.doctor.rules import d305_too_few_updates as too_few
from tests.doctor_case import assert_only_notes, curve, history

ALL = (too_high, too_low, too_short, too_long, too_few)

HEALTHY: dict[str, dict[str, Any]] = {
    "as usual": {},
    "noisy": {"noise": 0.12},
    "wsd": {"settings": ["optim.schedule=wsd"]},
    "constant": {"settings": ["optim.schedule=constant"]},
    "half-way": {"until": 90},
    "sixty updates": {"num_steps": 60},
    "a fifth is warm-up": {"settings": ["optim.warmup_steps=40"]},
    "no warm-up": {"settings": ["optim.warmup_steps=0"]},
    "short, but flat at the end": {"num_steps": 16, "loss": curve(3.0, 2.4, 0.5)},
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_healthy_runs_have_none_of_them(kind: Any, name: str, seed: int) -> None:
    assert_only_notes(ALL, history(kind, seed=seed, **HEALTHY[name]))


def test_a_base_that_is_lost_in_the_first_updates() -> None:
    def loss(step: int) -> float:
        return 2.0 if step < 5 else 2.9 + 1.5 * math.exp(-step / 60)

    found = too_high.RULE.check(history("fine-tune", loss))
    assert found is not None and found.severity == "warning" and 5 <= found.step <= 15
    assert "at the full learning rate the loss rose from 1.9" in found.what
    assert found.remedy == "optim.learning_rate=0.00033"


def test_a_loss_that_falls_only_when_the_rate_does() -> None:
    def loss(step: int) -> float:
        return 5.0 if step < 130 else 5.0 - 1.2 * (step - 130) / 70

    found = too_high.RULE.check(history(loss=lambda s: 6.8 - 1.8 * s / 12 if s < 12 else loss(s)))
    assert (
        found is not None
        and "fell by" in found.what
        and "only when the rate went down" in found.what
    )


def test_a_curve_that_does_not_bend() -> None:
    spent, losses = 0.0, []
    for row in history(num_steps=200).rows:
        losses.append(6.8 - 4.0 * spent)
        spent += row["learning_rate"]
    found = too_low.RULE.check(history(loss=losses, noise=0.01))
    assert found is not None and found.severity == "warning"
    assert "falls in a straight line" in found.what and found.remedy == "optim.learning_rate=0.003"


def test_a_loss_that_shoots_up_and_comes_back() -> None:
    def loss(step: int) -> float:
        return 2.4 - step / 400 + (2.0 if 3 <= step < 12 else 0.0)

    found = too_short.RULE.check(history("fine-tune", loss, settings=["optim.warmup_steps=1"]))
    assert found is not None and found.severity == "warning" and 3 <= found.step <= 6
    assert "after a warm-up of 1 updates the loss shot up" in found.what
    assert found.remedy == "optim.warmup_steps=20"


@pytest.mark.parametrize("warmup", [60, 180])
def test_a_warmup_that_takes_the_run(warmup: int) -> None:
    case = history(settings=[f"optim.warmup_steps={warmup}"], until=1)
    found = too_long.RULE.check(case)
    assert found is not None and (found.severity, found.step) == ("warning", 1)
    assert f"the warm-up takes {warmup} of 200 updates" in found.what
    assert found.remedy == "optim.warmup_steps=10"


def test_a_dozen_updates_that_still_learn() -> None:
    settings = ["train.step_rows=16"]
    case = history(num_steps=12, loss=lambda step: 6.8 - step / 4, settings=settings)
    found = too_few.RULE.check(case)
    assert found is not None and found.severity == "warning"
    assert "the run has 12 updates" in found.what and found.remedy == "train.step_rows=1"
    assert too_few.RULE.check(case.until(11)) is None  # it may be resumed with more


@pytest.mark.parametrize(
    ("kind", "rate"), [("pretrain", 0.1), ("fine-tune", 0.03), ("adapter", 0.1)]
)
def test_a_rate_as_large_as_the_weights(kind: Any, rate: float) -> None:
    case = history(kind, settings=[f"optim.learning_rate={rate}"], until=3)
    found = too_high.RULE.check(case)
    assert found is not None and (found.severity, found.step <= 3) == ("warning", True)
    assert "each update moves every weight by about as much" in found.what
    assert found.remedy == f"optim.learning_rate={rate / 10:g}"


def test_a_straight_curve_that_came_far_is_not_too_slow() -> None:
    losses = [6.8 - 4.0 * step / 200 for step in range(200)]
    case = history(loss=losses, noise=0.01, settings=["optim.schedule=constant"])
    assert too_low.RULE.check(case) is None


def test_validation_shows_the_bend_that_noise_hides() -> None:
    case = history("fine-tune", curve(5.1, 4.0, 30), valid=curve(5.1, 4.0, 30), noise=0.05)
    assert too_low.RULE.check(case) is None
    slow = history("fine-tune", lambda s: 5.1 - s / 400, valid=lambda s: 5.1 - s / 400, noise=0.02)
    found = too_low.RULE.check(slow)
    assert found is not None and found.severity == "warning"


def test_a_rate_that_is_too_high_is_not_called_too_low() -> None:
    rate = "optim.learning_rate=0.03"
    slow = history(
        "fine-tune", lambda s: 5.1 - s / 400, valid=lambda s: 5.1 - s / 400, settings=[rate]
    )
    assert too_low.RULE.check(slow) is None and too_high.RULE.check(slow) is not None
