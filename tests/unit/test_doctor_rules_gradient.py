"""The doctor's rules about the gradient and the batch, D201 to D205."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mule.doctor.finding import ALL_KINDS
from mule.doctor.rules import d201_exploding as exploding
from mule.doctor.rules import d202_vanishing as vanishing
from mule.doctor.rules import d203_clipped as clipped
from mule.doctor.rules import d204_noisy_batch as noisy
from mule.doctor.rules import d205_refused as refused
from tests.doctor_case import assert_only_notes, curve, history

ALL = (exploding, vanishing, clipped, noisy, refused)
SPIKE = {"kind": "update refused", "cause": "loss 9: a spike beyond 5, which is 6 standard ..."}

HEALTHY: dict[str, dict[str, Any]] = {
    "as usual": {},
    "short": {"num_steps": 12},
    "in the warm-up": {"until": 9},
    "norms far above the limit at first": {"norm": lambda step: 1.5 + 70 * math.exp(-step / 6)},
    "small, with norms of 4": {"norm": lambda step: 4.0},
    "large, with norms of 0.1": {"norm": lambda step: 0.1},
    "norms that treble": {"norm": lambda step: 0.5 * 3 ** (step / 200)},
    "one spike": {"events": [SPIKE | {"step": 150}]},
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_healthy_runs_have_none_of_them(kind: Any, name: str) -> None:
    for seed in (1, 2, 3):
        assert_only_notes(ALL, history(kind, seed=seed, **HEALTHY[name]))


def test_a_norm_that_explodes() -> None:
    def norm(step: int) -> float:
        return 0.8 if step < 120 else 0.8 * math.exp((step - 120) / 15)

    found = exploding.RULE.check(history(norm=norm))
    assert found is not None and found.severity == "warning" and 120 <= found.step <= 175
    assert "the gradient norm grew" in found.what and found.remedy == "optim.learning_rate=0.0005"


def test_an_adapter_begins_with_next_to_no_gradient() -> None:
    case = history("adapter", norm=lambda step: 0.02 + 0.5 * (1 - math.exp(-step / 30)))
    assert exploding.RULE.check(case) is None


@pytest.mark.parametrize("norm", [0.0, 3e-9])
def test_no_gradient_at_all(norm: float) -> None:
    found = vanishing.RULE.check(history(loss=lambda step: 5.0, norm=lambda step: norm))
    assert found is not None and (found.severity, found.step) == ("alarm", 1)
    assert "nothing reaches the weights" in found.what
    assert found.remedy == "train.precision=fp32"


def test_a_gradient_that_stops_arriving() -> None:
    case = history(norm=lambda step: 1.0 if step < 80 else 1e-3)
    found = vanishing.RULE.check(case)
    assert found is not None and found.step == 80 and "(it was 0.9" in found.what


def test_frozen_weights_are_named() -> None:
    case = history(norm=lambda step: 0.0, settings=["train.freeze=[model.layers.*]"])
    found = vanishing.RULE.check(case)
    assert found is not None and found.remedy.startswith(
        "train.freeze=[] (it holds model.layers.*)"
    )


def test_a_small_gradient_at_a_small_loss_is_what_it_should_be() -> None:
    case = history("fine-tune", curve(3.0, 0.0, 1.0), norm=lambda step: 2.0 / step**2)
    assert vanishing.RULE.check(case) is None


def test_clipping_far_above_the_limit_is_a_warning() -> None:
    case = history(norm=lambda step: 1.3, settings=["optim.max_grad_norm=0.01"])
    found = clipped.RULE.check(case)
    assert found is not None and found.severity == "warning" and found.step == 11
    assert "100% of the later updates were clipped" in found.what
    assert found.remedy.startswith("optim.max_grad_norm=1.")


def test_clipping_a_little_above_it_is_a_note() -> None:
    found = clipped.RULE.check(history(norm=lambda step: 3.0))
    assert found is not None and found.severity == "note"


def _targets(count: int) -> Any:
    return lambda step: {"num_targets": count}


def test_a_batch_of_next_to_nothing() -> None:
    case = history(noise=0.16, extra=_targets(32), settings=["train.step_rows=1"])
    found = noisy.RULE.check(case)
    assert found is not None and found.severity == "warning"
    assert "32 trained tokens" in found.what
    rows = int(found.remedy.removeprefix("train.step_rows="))
    assert 10 <= rows <= 40


def test_chats_may_differ_as_much_and_large_batches_are_not_small() -> None:
    assert noisy.RULE.check(history("fine-tune", noise=0.16, extra=_targets(300))) is None
    assert noisy.RULE.check(history(noise=0.16, extra=_targets(5000))) is None


def test_many_updates_refused() -> None:
    events = [SPIKE | {"step": 140 + 6 * n} for n in range(8)]
    found = refused.RULE.check(history(events=events))
    assert found is not None and (found.severity, found.step) == ("warning", 140)
    assert "8 of 72 updates were refused as spikes" in found.what


def test_a_run_that_went_back() -> None:
    back = {
        "kind": "rolled back",
        "step": 160,
        "to": 120,
        "cause": "5 updates in a row were refused",
    }
    found = refused.RULE.check(history(events=[back]))
    assert found is not None and (found.severity, found.step) == ("alarm", 160)
    assert "went back 1 times, first from update 160 to 120: 5 updates in a row" in found.what
