"""Speed and memory of a run as its rows have them."""

from __future__ import annotations

import mmap
import sys
import time

import pytest

from mule.train import meter
from mule.train.meter import Clock, Meter, memory_now_bytes


def test_the_wait_is_that_of_the_thread_that_waited_longest() -> None:
    before = Clock(10.0, {"1": 5.0, "2": 7.0})
    after = Clock(12.0, {"1": 5.5, "2": 7.1, "3": 9.0})  # thread 3 began meanwhile
    assert after.since(before) == (2.0, pytest.approx(0.5))
    assert Clock(10.1, {"1": 9.0}).since(before) == (pytest.approx(0.1), pytest.approx(0.1))
    assert Clock(11.0, {}).since(before) == (1.0, 0.0)


def test_sleeping_is_no_waiting_for_a_core() -> None:
    began = Clock.read()
    time.sleep(0.2)
    passed, waited = Clock.read().since(began)
    assert passed >= 0.2 and waited < 0.1
    if sys.platform == "linux":
        assert began.waited_s


def test_rates_are_over_the_updates_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Meter(flops_per_token=10.0, peak_flops=1e6)
    now = Clock(0.0, {"1": 0.0})
    for seconds, waited in ((9.0, 0.0), (2.0, 0.5), (2.0, 1.5)):
        later = Clock(now.now_s + seconds, {"1": now.waited_s["1"] + waited})
        monkeypatch.setattr(meter.Clock, "read", classmethod(lambda _, clock=later: clock))
        found.add(now, 1000)
        now = later
    rates = found.rates()
    assert rates["tokens_per_second"] == 500 and rates["steps_per_second"] == 0.5
    assert rates["core_wait_share"] == 0.5 and rates["share_of_peak"] == pytest.approx(0.005)
    assert found.overall()["tokens_per_second"] == 500


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident now")
def test_memory_now_follows_what_is_held() -> None:
    before = memory_now_bytes()
    held = mmap.mmap(-1, 64 * 2**20)  # fresh pages, whatever the process has freed before
    held.write(bytes(64 * 2**20))
    during = memory_now_bytes()
    assert before is not None and during is not None
    assert during - before > 48 * 2**20
    held.close()
    after = memory_now_bytes()
    assert after is not None and after < during - 48 * 2**20
