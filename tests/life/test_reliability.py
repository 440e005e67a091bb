"""Harness A, a few trials of every figure; `make test-all` does more, bench/reliability.py all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.life.figures import FIGURES
from tests.life.harness import FaultForker, Lab


@pytest.fixture(scope="module")
def lab(machine_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    server = FaultForker()
    yield Lab(tmp_path_factory.mktemp("lab"), server)
    server.close()


# Long even with few trials; test_kill.py, test_guard_ranks.py and unit/test_guard.py are quicker.
LONG = ("F1", "F2", "F3", "F4", "F5", "F6", "F8", "F9", "F10", "F11", "F12")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in FIGURES]
)
def test_a_few_trials(lab: Lab, name: str) -> None:
    check(lab, name, full=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["F1", "F5", "F7", "F8", "F9", "F10", "F11", "F12"])
def test_all_trials(lab: Lab, name: str) -> None:
    check(lab, name, full=True)


def check(lab: Lab, name: str, *, full: bool) -> None:
    """Every trial of the figure holds."""
    labels = []
    for trial in FIGURES[name].trials(lab, full):
        labels.append(trial.label)
        try:
            trial.work()
        except AssertionError as error:
            raise AssertionError(f"{name}, {trial.label}: {error}") from error
    assert labels and len(set(labels)) == len(labels)
