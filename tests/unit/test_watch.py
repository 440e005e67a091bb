"""The doctor beside a training: said once, also after a resume, and never in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mule import progress
from mule.doctor.finding import Found, Rule
from mule.run import Run
from mule.train import watch
from mule.train.watch import Watch
from tests.doctor_case import history, run_folder

NAN = {"kind": "update refused", "cause": "loss nan, gradient norm nan"}


class Listener(progress.Silence):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, level: str) -> None:
        self.notes.append(text)


def _look(run: Run, case: Any, done: int, **options: Any) -> tuple[Watch, list[str]]:
    listener = Listener()
    watching = Watch(run, case.recipe, **{"writes": True, **options})
    with progress.using(listener), run.lock():
        watching.look(done)
        watching.look(done, is_last=True)
    return watching, listener.notes


def test_a_finding_is_said_and_logged_once(tmp_path: Path) -> None:
    case = history(until=100, events=[NAN | {"step": 60}], settings=["optim.warmup_steps=90"])
    run = run_folder(tmp_path, case)
    watching, notes = _look(run, case, 100)
    assert watching.line == {"doctor": "D304, D101"}
    assert len(notes) == 2 and notes[0].startswith(
        "warm-up too long (D304, warning, since update 1)"
    )
    assert "Try optim.warmup_steps=10; mule doctor --explain D304 says why" in notes[0]
    events = run.standing_events(watch.DOCTOR)
    assert [(e["code"], e["severity"], e["since"]) for e in events] == [
        ("D304", "warning", 1),
        ("D101", "warning", 60),
    ]
    with run.lock():
        run.start_attempt(from_step=100)
    _, notes = _look(run, case, 100)
    assert notes == [] and len(run.standing_events(watch.DOCTOR)) == 2


def test_it_is_said_again_when_it_gets_worse(tmp_path: Path) -> None:
    case = history(until=100, events=[NAN | {"step": 60}])
    run = run_folder(tmp_path, case)
    assert len(_look(run, case, 100)[1]) == 1
    with run.lock():
        run.log_event(**NAN, step=90)
    _, notes = _look(run, case, 100)
    assert len(notes) == 1 and notes[0].startswith("not a number (D101, alarm")


def test_a_healthy_run_is_left_in_peace(tmp_path: Path) -> None:
    case = history(until=100)
    watching, notes = _look(run_folder(tmp_path, case), case, 100)
    assert notes == [] and watching.line == {"doctor": "healthy"}


def test_processes_that_do_not_write_do_not_look(tmp_path: Path) -> None:
    case = history(until=100, events=[NAN | {"step": 60}])
    watching, notes = _look(run_folder(tmp_path, case), case, 100, writes=False)
    assert notes == [] and watching.line == {}


def test_looks_are_rare_enough_to_cost_a_hundredth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    looked = []

    def read(run: Run, recipe: Any) -> Any:
        looked.append(now[0])
        now[0] += 0.5  # what a look takes
        return case

    monkeypatch.setattr(watch, "read_history", read)
    case = history(until=100)
    run = run_folder(tmp_path, case)
    watching = Watch(run, case.recipe, writes=True)
    with run.lock():
        while now[0] < 200:
            watching.look(100)
            now[0] += 1.0
    assert len(looked) * 0.5 <= 0.01 * 200 + 0.5
    assert len(looked) >= 3


def test_a_defect_of_a_rule_costs_nobody_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(history: Any) -> Found | None:
        raise ZeroDivisionError("a rule divides")

    monkeypatch.setattr("mule.doctor.examine.all_rules", lambda: (Rule("D999", "x", broken),))
    case = history(until=100)
    run = run_folder(tmp_path, case)
    _, notes = _look(run, case, 100)
    told = "the doctor stopped watching (ZeroDivisionError: a rule divides): a defect of Mule"
    assert notes == [told]
    assert [event["kind"] for event in run.events()][-1] == "doctor failed"
