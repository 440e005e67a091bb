"""The doctor's rules about memory, speed, experts, adapters and bases: D601 to D802."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from mule.doctor.finding import ALL_KINDS
from mule.doctor.rules import d601_memory_growing as growing
from mule.doctor.rules import d602_fragmentation as fragmented
from mule.doctor.rules import d603_slowing_down as slowing
from mule.doctor.rules import d604_slower_than_planned as slower
from mule.doctor.rules import d701_dead_experts as dead
from mule.doctor.rules import d702_overloaded_experts as overloaded
from mule.doctor.rules import d703_router_collapse as collapsed
from mule.doctor.rules import d801_adapter_idle as idle
from mule.doctor.rules import d802_wrong_base as wrong_base
from tests.doctor_case import curve, history

MIB = 2**20
EXPERTS = (dead, overloaded, collapsed)


# ---------------------------------------------------------------- D601, D602


def _peaks(seed: int) -> Callable[[int], dict[str, Any]]:
    """As a healthy run's: a few steps up, most of them early."""
    rng, level = random.Random(seed), [650 * MIB]

    def row(step: int) -> dict[str, Any]:
        if rng.random() < 2 / step:
            level[0] += rng.randint(2, 60) * MIB
        return {"memory_bytes": level[0], "memory_now_bytes": level[0] - rng.randint(0, 90) * MIB}

    return row


@pytest.mark.parametrize("seed", range(10))
def test_memory_that_comes_to_rest_is_healthy(seed: int) -> None:
    assert growing.RULE.check(history(extra=_peaks(seed))) is None
    peaks = _peaks(seed)
    only = history(extra=lambda s: {"memory_bytes": peaks(s)["memory_bytes"]})
    assert growing.RULE.check(only) is None


@pytest.mark.parametrize("per_update", [1, 4])
def test_memory_that_grows_with_every_update(per_update: int) -> None:
    rng = random.Random(1)

    def row(step: int) -> dict[str, Any]:
        now = (400 + per_update * step + rng.randint(0, 8)) * MIB
        return {"memory_bytes": 900 * MIB, "memory_now_bytes": now}

    found = growing.RULE.check(history(extra=row))
    assert found is not None and found.severity == "warning"
    assert found.evidence["bytes_an_update"] == pytest.approx(per_update * MIB, rel=0.1)
    assert f"{found.evidence['bytes_an_update'] / MIB:.2f} MiB an update" in found.what
    assert "checkpoint.every_steps=" in found.remedy


def test_growth_is_seen_in_peaks_and_per_attempt() -> None:
    case = history(extra=lambda s: {"memory_bytes": (400 + 2 * s) * MIB})
    assert growing.RULE.check(case) is not None
    assert growing.RULE.check(case.until(30)) is None
    resumed = history(
        extra=lambda s: {"memory_bytes": 400 * MIB, "attempt": 1 if s < 100 else 2},
    )
    assert growing.RULE.check(resumed) is None


def test_growth_that_slows_down_ends_by_itself() -> None:
    case = history(extra=lambda s: {"memory_bytes": round((400 + 300 * (1 - 0.97**s)) * MIB)})
    assert growing.RULE.check(case) is None


def _devices(gap: Callable[[int], float]) -> Callable[[int], dict[str, Any]]:
    def row(step: int) -> dict[str, Any]:
        if step % 20:
            return {}
        active = 10 * 2**30
        reserved = active + round(gap(step) * 2**30)
        return {"devices": [{"peak_reserved_bytes": reserved, "peak_active_bytes": active}]}

    return row


def test_fragmentation_is_reserved_memory_that_grows_beside_the_active() -> None:
    found = fragmented.RULE.check(history(extra=_devices(lambda s: 0.5 + s / 40)))
    assert found is not None and "5.5 of 15.5 GiB are reserved and not in use" in found.what
    assert "expandable_segments:True" in found.remedy
    assert fragmented.RULE.check(history(extra=_devices(lambda s: 3.0))) is None
    assert fragmented.RULE.check(history(extra=_devices(lambda s: 0.5 + s / 400))) is None
    assert fragmented.RULE.check(history()) is None


# ---------------------------------------------------------------- D603, D604


def _speed(
    rate: Callable[[int], float],
    wait: Callable[[int], float] = lambda s: 0.0,
    noise: float = 0.15,
) -> Any:
    rng = random.Random(2)

    def row(step: int) -> dict[str, Any]:
        tokens = rate(step) * (1 - wait(step)) * rng.uniform(1 - noise, 1 + noise)
        return {
            "tokens_per_second": tokens,
            "steps_per_second": tokens / 1000,
            "core_wait_share": wait(step),
        }

    return row


def test_a_run_that_slows_down() -> None:
    case = history(extra=_speed(lambda s: 4000 if s < 80 else 4000 * 80 / s / 1.4))
    found = slowing.RULE.check(case)
    assert found is not None and found.severity == "warning" and 70 <= found.step <= 140
    assert "tokens a second, after" in found.what and "--resume" in found.remedy
    assert slowing.RULE.check(case.until(70)) is None


def test_a_slow_decline_counts_before_half_is_lost() -> None:
    def rate(step: int) -> float:
        return 4000 if step < 60 else 4000 / (1 + (step - 60) / 180)

    case = history(extra=_speed(rate, noise=0.03))
    found = slowing.RULE.check(case)
    assert found is not None and found.severity == "warning"
    stepped = history(extra=_speed(lambda s: 4000 if s < 60 else 2400, noise=0.03))
    assert slowing.RULE.check(stepped) is None


def test_what_others_take_is_no_fault_of_the_run() -> None:
    def wait(step: int) -> float:
        return 0.7 if step > 90 else 0.05

    found = slowing.RULE.check(history(extra=_speed(lambda s: 4000, wait)))
    assert found is not None and found.severity == "note" and "others on the machine" in found.what


def test_where_nobody_tells_of_others_only_a_quarter_counts() -> None:
    def untold(step: int, share: float) -> dict[str, Any]:
        return {"tokens_per_second": 4000.0 * (share if step > 90 else 1), "core_wait_share": None}

    found = slowing.RULE.check(history(extra=lambda s: untold(s, 0.4)))
    assert found is not None and found.severity == "note"
    found = slowing.RULE.check(history(extra=lambda s: untold(s, 0.2)))
    assert found is not None and found.severity == "warning"


@pytest.mark.parametrize("dip", [60, 120, 175])
def test_a_slow_stretch_that_ends_is_healthy(dip: int) -> None:
    def rate(step: int) -> float:
        return 1500 if dip <= step < dip + 15 else 4000

    assert slowing.RULE.check(history(extra=_speed(rate))) is None


def _planned(seconds: float) -> dict[str, Any]:
    return {"plan": {"update_s": seconds, "basis": "measured"}}


def test_slower_than_planned() -> None:
    case = history(extra=_speed(lambda s: 4000), facts=_planned(0.05))
    found = slower.RULE.check(case)
    assert found is not None and found.severity == "warning"
    assert "planned 0.05" in found.what
    assert slower.RULE.check(history(extra=_speed(lambda s: 4000), facts=_planned(0.22))) is None
    assert slower.RULE.check(history(extra=_speed(lambda s: 4000))) is None
    busy = history(extra=_speed(lambda s: 4000, lambda s: 0.8), facts=_planned(0.25))
    found = slower.RULE.check(busy)
    assert found is not None and found.severity == "note"


# ---------------------------------------------------------------- D701, D702, D703


def _routing(shares: list[float], *, tokens: int = 4000, every: int = 20) -> Any:
    rng = random.Random(4)

    def row(step: int) -> dict[str, Any]:
        if step % every:
            return {}
        fair = [1.0] * len(shares)
        counts = [
            [round(tokens * x * rng.uniform(0.6, 1.5) / len(x_)) for x in x_]
            for x_ in (fair, shares)
        ]
        return {"moe": {"layers": [0, 1], "tokens_per_expert": counts}}

    return row


def _experts(shares: list[float], per_token: int = 2, **more: Any) -> Any:
    facts = {"experts": {"num": len(shares), "per_token": per_token}}
    return history(extra=_routing(shares, **more), facts=facts)


@pytest.mark.parametrize(
    "shares", [[1.0] * 8, [2.2, 1.5, 1, 1, 0.7, 0.6, 0.5, 0.5], [1.9, 1.6, 1, 0.3, 0.2]]
)
def test_uneven_experts_are_healthy(shares: list[float]) -> None:
    assert [rule.RULE.code for rule in EXPERTS if rule.RULE.check(_experts(shares))] == []


def test_dead_experts() -> None:
    found = dead.RULE.check(_experts([1.5, 1.5, 0.0, 1.5, 1.5, 0.0]))
    assert found is not None and found.severity == "warning"
    assert "2 of 12 experts get less than 2% of their share" in found.what
    assert "in the blocks 1)" in found.what and "model.moe.aux_loss=0.1" in found.remedy
    assert overloaded.RULE.check(_experts([1.5, 1.5, 0.0, 1.5, 1.5, 0.0])) is None


def test_a_collapsed_router_is_an_alarm() -> None:
    case = _experts([4.0, 3.9, 0.02, 0.02, 0.02, 0.02, 0.01, 0.01])
    found = collapsed.RULE.check(case)
    assert found is not None and found.severity == "alarm"
    assert "of 8 experts (each token gets 2)" in found.what
    over = overloaded.RULE.check(case)
    assert over is not None and "times its share, of 4.0 possible" in over.what


def test_an_adapters_router_is_frozen() -> None:
    facts = {"experts": {"num": 6, "per_token": 2}}
    case = history("adapter", extra=_routing([1.5, 1.5, 0.0, 1.5, 1.5, 0.0]), facts=facts)
    found = dead.RULE.check(case)
    assert found is not None and found.severity == "note" and "frozen" in found.remedy


def test_few_reports_and_few_tokens_say_nothing() -> None:
    shares = [3.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    assert dead.RULE.check(_experts(shares).until(60)) is None
    assert dead.RULE.check(_experts(shares, tokens=60)) is None


# ---------------------------------------------------------------- D801, D802


def _change(value: float) -> Callable[[int], dict[str, Any]]:
    return lambda step: {"adapter_change": value} if step % 20 == 0 else {}


def test_an_adapter_that_does_nothing() -> None:
    case = history("adapter", lambda s: 2.6, valid=lambda s: 2.5, extra=_change(3e-7))
    found = idle.RULE.check(case)
    assert found is not None and found.severity == "warning"
    assert "changes the weights by 3.0e-07 of their size" in found.what
    assert found.remedy == "optim.learning_rate=0.01"
    assert idle.RULE.check(history("adapter", extra=_change(0.004))) is None
    falling = history("adapter", valid=curve(2.6, 1.6, 12), extra=_change(5e-5))
    assert idle.RULE.check(falling) is None


def _base(gain: float, error: float = 0.05, **more: float) -> Any:
    figures = {"order_gain": gain, "order_gain_error": error, "template_differs": bool(more)}
    return {"vocab_size": 32_000, "base": figures | more}


@pytest.mark.parametrize("kind", ["fine-tune", "adapter"])
def test_a_base_that_does_not_know_the_tokens(kind: Any) -> None:
    case = history(kind, lambda s: 10.3, facts=_base(0.01))
    found = wrong_base.RULE.check(case)
    assert found is not None and found.severity == "alarm"
    assert "no likelier in their order than shuffled (0.01 nats a token" in found.what
    assert "mule chat base" in found.remedy
    other = history(kind, facts=_base(0.01), settings=["tokenizer.path=other"])
    found = wrong_base.RULE.check(other)
    assert found is not None and found.remedy.startswith("remove tokenizer.path")


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_foreign_subject_is_no_wrong_base(kind: Any) -> None:
    high = history(kind, curve(7.0, 2.0, 12), facts=_base(0.35))
    assert wrong_base.RULE.check(high) is None
    assert wrong_base.RULE.check(history(kind)) is None


def test_another_template_must_not_cost_much() -> None:
    costly = _base(2.0, template_cost=0.4, template_cost_error=0.1)
    found = wrong_base.RULE.check(history("fine-tune", facts=costly))
    assert found is not None and found.severity == "warning"
    assert "answers cost 0.40 nats a token more with it (±0.10)" in found.what
    assert found.remedy.startswith("remove tokenizer.path")
    for cost, error in ((0.4, 0.3), (0.02, 0.001), (-0.3, 0.1)):
        cheap = _base(2.0, template_cost=cost, template_cost_error=error)
        assert wrong_base.RULE.check(history("fine-tune", facts=cheap)) is None


@pytest.mark.parametrize("kind", ["fine-tune", "adapter"])
def test_targets_that_are_not_what_follows(kind: Any) -> None:
    facts = _base(2.0)
    facts["base"]["plain_loss"] = 5.5
    found = wrong_base.RULE.check(history(kind, curve(7.8, 5.0, 12), noise=0, facts=facts))
    assert found is not None and found.severity == "warning"
    assert "the first loss is 7.80, that of the same rows as plain text 5.50" in found.what
    assert found.remedy.startswith("mule data preview RECIPE")
    assert wrong_base.RULE.check(history(kind, curve(6.4, 5.0, 12), noise=0, facts=facts)) is None
