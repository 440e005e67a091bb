"""Spikes, refused updates and rollbacks: what is decided, and what a resumed run knows of it."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from mule.errors import CheckFailed
from mule.run import Run
from mule.train.guard import MAX_REFUSED_IN_A_ROW, WINDOW_STEPS, Guard


def filled(
    max_spike: float | None = 6.0, *, spread: float = 0.1, count: int = WINDOW_STEPS
) -> Guard:
    """A guard that has seen updates of loss 2 and norm 3, give or take."""
    guard, chance = Guard(max_spike), random.Random(7)
    for _ in range(count):
        guard.applied(chance.gauss(2, spread), chance.gauss(3, spread))
    return guard


def test_a_spike_of_loss_or_norm_is_refused_with_its_limit() -> None:
    guard = filled()
    assert guard.spike(2.3, 3.3) is None
    assert guard.spike(-math.inf, 0.0) is None  # below is no spike
    found = guard.spike(20.0, 3.0)
    assert found is not None and found.startswith("loss 20: a spike beyond ")
    assert found.endswith("which is 6 standard deviations above the last 128 updates")
    limit = float((guard.spike(20.0, 3.0) or "").split("beyond ")[1].split(",")[0])
    assert 2 + 5 * 0.1 < limit < 2 + 7 * 0.1
    assert guard.spike(limit - 0.01, 3.0) is None and guard.spike(limit + 0.01, 3.0) is not None


def test_norms_that_slowly_rise_are_no_spike() -> None:
    """Clipping holds what is not a few times as long as usual."""
    guard = filled()
    assert guard.spike(2.0, 8.5) is None
    found = guard.spike(2.0, 9.5)
    assert found is not None and found.startswith("gradient norm 9.5: a spike beyond ")
    assert found.endswith(", which is 3 times that of the last 128 updates")
    found = filled(spread=2.0).spike(2.0, 50.0)  # where norms differ much, their spread counts
    assert found is not None and found.startswith("gradient norm 50: a spike beyond 1")
    assert found.endswith("which is 6 standard deviations above the last 128 updates")


def test_a_spike_that_was_applied_does_not_hide_the_next() -> None:
    guard = filled()
    for _ in range(3):  # while the window was filling, say
        guard.applied(2.0, 60.0)
    assert guard.spike(2.0, 30.0) is not None


def test_nothing_is_a_spike_before_the_window_is_full_or_when_switched_off() -> None:
    assert filled(count=WINDOW_STEPS - 1).spike(1e9, 1e9) is None
    assert filled(None).spike(1e9, 1e9) is None


def test_a_constant_loss_does_not_make_every_change_a_spike() -> None:
    guard = filled(spread=0.0)
    assert guard.spike(2.1, 3.1) is None
    assert guard.spike(2.2, 3.0) is not None


def test_only_refusals_in_a_row_mean_that_a_run_is_stuck() -> None:
    guard = Guard(6.0)
    for done in (1, 2, 3, 4):
        guard.refused(done)
    guard.applied(2.0, 3.0)
    for done in (6, 7, 8, 9):
        guard.refused(done)
        assert not guard.is_stuck
    guard.refused(10)
    assert guard.is_stuck and MAX_REFUSED_IN_A_ROW == 5
    assert guard.why_stuck() == "5 updates in a row were refused, 6 to 10"


def test_the_reported_loss_is_the_mean_of_the_last_twenty() -> None:
    guard = Guard(None)
    assert guard.recent_loss() == 0
    for loss in range(30):
        guard.applied(float(loss), 1.0)
    assert guard.recent_loss() == sum(range(10, 30)) / 20


# ---------------------------------------------------------------- what the logs tell


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path, "pizza", "train: {steps: 5}\n")
    run.start_attempt(from_step=0)
    return run


def applied(run: Run, *steps: int) -> None:
    for step in steps:
        run.log_metrics({"step": step, "loss": step / 7, "grad_norm": step / 3})


def refused(run: Run, *steps: int) -> None:
    for step in steps:
        run.log_event("update refused", step=step, cause="loss nan")


def test_the_window_comes_back_from_the_log_to_the_last_bit(run: Run) -> None:
    applied(run, *range(1, 201))
    guard, same = Guard(6.0), Guard(6.0)
    for step in range(1, 191):
        same.applied(step / 7, step / 3)
    guard.restore(Guard.read(run, 190))
    assert list(guard._applied) == list(same._applied) and len(guard._applied) == WINDOW_STEPS


def test_a_rollback_undoes_rows_and_refusals(run: Run) -> None:
    applied(run, 1, 2, 3, 4, 5)
    run.log_samples(2, {"a": "b"})
    run.log_samples(4, {"a": "c"})
    refused(run, 6, 7, 8, 9, 10)
    run.log_event("rolled back", step=10, to=3, cause="5 updates in a row")
    applied(run, 11)
    past = Guard.read(run, 11)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 11]
    assert [row["step"] for row in run.samples()] == [2]
    assert [loss for loss, _ in past["applied"]] == [1 / 7, 2 / 7, 3 / 7, 11 / 7]
    assert past["rollbacks"] == [10]


def test_a_rollback_that_a_kill_took_back_counts_once(run: Run) -> None:
    """Killed between the event and the checkpoint: the resumed run comes to it again."""
    applied(run, 1, 2, 3, 4, 5)
    refused(run, 6, 7, 8, 9, 10)
    run.log_event("rolled back", step=10, to=3, cause="5 updates in a row")
    run.start_attempt(from_step=3)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert Guard.read(run, 3)["rollbacks"] == []
    applied(run, 4, 5)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5]
    refused(run, 6, 7, 8, 9, 10)
    run.log_event("rolled back", step=10, to=3, cause="5 updates in a row")
    assert Guard.read(run, 10)["rollbacks"] == [10]
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_there_must_be_a_checkpoint_to_go_back_to() -> None:
    with pytest.raises(CheckFailed, match="refused, 1 to 5, before the first checkpoint") as caught:
        Guard(6.0).check_may_roll_back("5 updates were refused, 1 to 5", None, 0.01)
    assert caught.value.hint == (
        "lower optim.learning_rate (now 0.01) in a new run, or warm up longer"
    )


def test_rollbacks_are_bounded() -> None:
    guard = Guard(6.0)
    guard.restore({"applied": [], "rollbacks": [10, 20]})
    guard.check_may_roll_back("stuck", 4, 0.01)
    guard.restore({"applied": [], "rollbacks": [10, 20, 30]})
    with pytest.raises(CheckFailed) as caught:
        guard.check_may_roll_back("stuck", 4, 0.01)
    assert caught.value.message == (
        "stuck, and going back has not helped (after the updates 10, 20, 30)"
    )
    assert caught.value.hint == (
        "look at the rows of these updates; else lower optim.learning_rate (now 0.01) in a new run; "
        "the checkpoint after update 4 is good: model.path can start from it"
    )
