"""The doctor's rules about the loss, D101 to D106: what they see, and what they leave alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mule.doctor.finding import ALL_KINDS
from mule.doctor.rules import d101_not_finite as not_finite
from mule.doctor.rules import d102_not_falling as not_falling
from mule.doctor.rules import d103_oscillating as oscillating
from mule.doctor.rules import d104_diverging as diverging
from mule.doctor.rules import d105_zero as zero
from mule.doctor.rules import d106_plateau as plateau
from tests.doctor_case import assert_only_notes, curve, history

ALL = (not_finite, not_falling, oscillating, diverging, zero, plateau)
NAN = {"kind": "update refused", "cause": "loss nan, gradient norm nan"}
SPIKE = {"kind": "update refused", "cause": "loss 9: a spike beyond 5, which is 6 standard ..."}


def _steps(step: int) -> float:
    """Chats in epochs of 50 updates: the loss drops where rows come again."""
    return 2.4 - 0.25 * ((step - 1) // 50)


HEALTHY: dict[str, dict[str, Any]] = {
    "as usual": {},
    "short": {"num_steps": 12, "noise": 0.1},
    "noisy": {"noise": 0.12},
    "wsd": {"settings": ["optim.schedule=wsd"]},
    "constant": {"settings": ["optim.schedule=constant"]},
    "linear": {"settings": ["optim.schedule=linear"]},
    "half-way": {"until": 90},
    "in the warm-up": {"until": 8},
    "long": {"num_steps": 3000},
    "validated": {"valid": curve(5.0, 2.0, 15)},
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_healthy_runs_have_none_of_them(kind: Any, name: str, seed: int) -> None:
    assert_only_notes(ALL, history(kind, seed=seed, **HEALTHY[name]))


def test_steps_between_epochs_are_healthy() -> None:
    case = history("fine-tune", _steps, noise=0.08)
    assert all(rule.RULE.check(case) is None for rule in ALL)


# ---------------------------------------------------------------- D101


def test_updates_that_are_not_a_number() -> None:
    found = not_finite.RULE.check(history(events=[NAN | {"step": 40}, NAN | {"step": 90}]))
    assert found is not None and (found.severity, found.step) == ("alarm", 40)
    assert "2 of 200 updates were refused (loss nan" in found.what
    assert found.remedy == "optim.learning_rate=0.0005"


def test_one_alone_is_a_warning_and_fp16_has_its_own_remedy() -> None:
    case = history(events=[NAN | {"step": 40}], settings=["train.precision=fp16"])
    found = not_finite.RULE.check(case)
    assert found is not None and found.severity == "warning"
    assert found.remedy == "train.precision=fp32"


def test_a_validation_that_is_not_finite() -> None:
    case = history(valid=lambda step: None if step > 100 else 3.0)  # type: ignore[arg-type,return-value]
    found = not_finite.RULE.check(case)
    assert found is not None and found.severity == "alarm" and "not finite 5 times" in found.what


def test_a_spike_is_a_number() -> None:
    assert not_finite.RULE.check(history(events=[SPIKE | {"step": 140}])) is None


# ---------------------------------------------------------------- D102


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_loss_that_does_not_fall(kind: Any) -> None:
    found = not_falling.RULE.check(history(kind, lambda step: 3.2 - step / 10_000))
    assert found is not None and found.severity == "warning"
    assert "the loss has not fallen: 3." in found.what
    assert found.remedy == "optim.learning_rate=0.003"


def test_noise_alone_is_not_called_flat() -> None:
    assert not_falling.RULE.check(history("fine-tune", lambda step: 3.2, noise=0.25)) is None


def test_validation_that_falls_tells_of_learning() -> None:
    flat = history("fine-tune", lambda step: 3.2, valid=curve(3.2, 2.9, 50))
    assert not_falling.RULE.check(flat) is None


def test_a_fall_in_the_very_first_updates_counts() -> None:
    case = history("adapter", lambda step: 5.7 if step < 3 else 5.45, noise=0.005)
    assert not_falling.RULE.check(case) is None


# ---------------------------------------------------------------- D103


def test_a_loss_that_swings() -> None:
    found = oscillating.RULE.check(history(loss=lambda step: 3 + 0.8 * math.sin(step / 9)))
    assert found is not None and found.severity == "warning"
    assert "the loss swings" in found.what and found.remedy == "optim.learning_rate=0.0005"


def test_a_loss_that_spikes() -> None:
    found = oscillating.RULE.check(history(loss=lambda step: 6.0 if step % 20 == 19 else 2.5))
    assert found is not None and "the loss spikes: " in found.what
    assert "read the rows of update" in found.remedy


def test_a_noise_that_grows() -> None:
    def loss(step: int) -> float:
        return 3.0 + (0.5 * (-1) ** step if step > 120 else 0.0)

    found = oscillating.RULE.check(history(loss=loss, noise=0.02))
    assert found is not None and "times as much as before" in found.what


# ---------------------------------------------------------------- D104


def test_a_loss_that_passes_its_start_is_an_alarm() -> None:
    def loss(step: int) -> float:
        return 6.0 / (1 + step / 10) + 2 if step < 100 else 2.6 + (step - 100) / 10

    found = diverging.RULE.check(history(loss=loss))
    assert found is not None and found.severity == "alarm" and 95 <= found.step <= 125
    assert "the loss rose from 2." in found.what


def test_a_loss_that_gives_back_a_part_is_a_warning() -> None:
    def loss(step: int) -> float:
        return 2.5 + 4 / (1 + step / 10) + (1.2 if step > 150 else 0.0)

    found = diverging.RULE.check(history(loss=loss))
    assert found is not None and found.severity == "warning"


def test_it_is_seen_soon_after_it_began() -> None:
    def loss(step: int) -> float:
        return 6.0 / (1 + step / 10) + 2 if step < 100 else 2.6 + (step - 100) / 10

    case = history(loss=loss)
    seen = next(step for step in range(20, 200) if diverging.RULE.check(case.until(step)))
    assert 100 < seen < 130


# ---------------------------------------------------------------- D105


def test_a_loss_of_nothing_on_new_rows() -> None:
    def loss(step: int) -> float:
        return 6.0 * 0.9**step + 0.004

    found = zero.RULE.check(history(loss=loss))
    assert found is not None and found.severity == "alarm"
    assert "the answer stands in the input" in found.what and "data preview" in found.remedy


def test_a_loss_learned_by_heart_is_another_rules() -> None:
    def epochs(step: int) -> dict[str, float]:
        return {"epoch": step / 5}

    case = history("fine-tune", lambda step: 3 * 0.95**step, extra=epochs, valid=lambda step: 2.5)
    assert zero.RULE.check(case) is None


# ---------------------------------------------------------------- D106


def test_pretraining_that_stops_early_is_a_warning() -> None:
    found = plateau.RULE.check(history(loss=curve(6.6, 5.3, 1), noise=0.02))
    assert found is not None and found.severity == "warning" and found.step <= 75
    assert "the loss has stood at 5." in found.what


def test_strong_dropout_is_a_warning() -> None:
    case = history(
        loss=curve(6.8, 4.5, 30), valid=curve(6.8, 3.9, 30), settings=["train.dropout=0.7"]
    )
    found = plateau.RULE.check(case)
    assert found is not None and found.severity == "warning" and found.remedy == "train.dropout=0"
    assert "a dropout of 0.7 holds the model back" in found.what


def test_a_flat_end_at_a_constant_rate_is_a_note() -> None:
    case = history(
        "fine-tune",
        curve(2.6, 1.6, 2),
        valid=curve(2.6, 1.6, 0.5),
        settings=["optim.schedule=constant"],
    )
    found = plateau.RULE.check(case)
    assert found is not None and found.severity == "note"
    assert found.remedy == "optim.schedule=wsd optim.learning_rate=0.00085"


def test_a_flat_end_of_a_cosine_is_healthy() -> None:
    case = history("fine-tune", curve(2.6, 1.6, 2), valid=curve(2.6, 1.6, 0.5))
    assert plateau.RULE.check(case) is None


def test_a_rise_that_is_over_is_still_told() -> None:
    def loss(step: int) -> float:
        return 5.5 + 1.3 / (1 + step / 10) + (1.5 if 100 <= step < 125 else 0.0)

    found = diverging.RULE.check(history(loss=loss, noise=0.01))
    assert found is not None and found.severity == "warning" and 98 <= found.step <= 110
    assert "and was back only at update" in found.what


def test_training_unlike_validation_in_the_first_epoch() -> None:
    case = history(
        num_steps=90, loss=lambda step: 5.5 * 0.96**step + 0.3, valid=lambda step: 6.5 + step / 40
    )
    found = zero.RULE.check(case)
    assert found is not None and found.severity == "alarm"
    assert "in the first epoch, on rows it had never seen" in found.what


def test_validation_on_harder_text_is_no_leak() -> None:
    case = history(num_steps=90, loss=curve(6.8, 1.5, 10), valid=curve(7.5, 4.0, 20))
    assert zero.RULE.check(case) is None


def test_weights_that_are_held() -> None:
    settings = ["train.freeze=[model.layers.*]"]
    facts = {"trained": {"num_trained": 900, "num_weights": 100_000}}
    found = not_falling.RULE.check(history("fine-tune", settings=settings, facts=facts))
    assert found is not None and (found.severity, found.step) == ("warning", 1)
    assert (
        "0.90% of the weights are trained: train.freeze holds the rest (model.layers.*)"
        in found.what
    )
    assert not_falling.RULE.check(history("adapter", facts=facts)) is None


def test_strong_dropout_that_keeps_the_rows_unknown_is_what_it_is_for() -> None:
    case = history(
        "fine-tune", curve(2.6, 1.0, 12), valid=curve(2.6, 1.6, 12), settings=["train.dropout=0.4"]
    )
    assert plateau.RULE.check(case) is None


@pytest.mark.parametrize(("plain", "found"), [(5.5, True), (6.2, False)])
def test_a_fine_tune_is_stuck_above_its_base_only(plain: float, found: bool) -> None:
    facts = {"base": {"plain_loss": plain}}
    case = history("fine-tune", curve(7.6, 5.7, 1), noise=0.02, facts=facts)
    seen = plateau.RULE.check(case)
    assert (seen is not None and seen.severity == "warning") is found
