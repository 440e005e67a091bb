"""RELIABILITY.md says what the trials came to, with its bounds, and is that of its results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from bench import reliability
from tests.life.figures import FIGURES
from tests.life.harness import Figure, Lab, Trial

NOWHERE = cast(Lab, None)


def _figure(*works: Any) -> Figure:
    def trials(_lab: Lab, _full: bool) -> Iterator[Trial]:
        for number, work in enumerate(works):
            yield Trial(f"seed {number}", work)

    return Figure("a title", "a promise", trials)


def _fail() -> dict[str, Any]:
    raise AssertionError("it\n  differs")


def _break() -> dict[str, Any]:
    raise KeyError("files")


@pytest.fixture
def measured() -> dict[str, Any]:
    works = (lambda: {"killed": True, "step": 4, "how": "cut"}, _fail, lambda: {"killed": False})
    found = reliability.measure(_figure(*works, _break), NOWHERE, True)
    machine = {"cpu": "a processor", "cores": 2}
    return found | {"commit": "abc1234", "date": "2026-01-02", "machine": machine}


def test_every_failure_is_counted_with_its_label(measured: dict[str, Any]) -> None:
    assert measured["trials"] == 4
    assert measured["failures"] == [
        {"trial": "seed 1", "cause": "it differs"},
        {"trial": "seed 3", "cause": "'files'"},
    ]
    assert measured["measured"] == {
        "killed": 1,
        "step": {"lowest": 4, "highest": 4},
        "how": {"cut": 1},
    }


@pytest.mark.parametrize(
    ("trials", "failures", "limit"),
    [(100, 0, 0.03), (1000, 0, 0.003), (2, 0, 1.0), (100, 1, 0.0466), (10, 10, 1.0)],
)
def test_the_bound(trials: int, failures: int, limit: float) -> None:
    """1 of 100: the one-sided Clopper-Pearson limit of the tables."""
    assert reliability.bound(trials, failures) == pytest.approx(limit, abs=1e-4)


def test_the_page(measured: dict[str, Any]) -> None:
    text = reliability.page({"F1": measured, "F4": measured | {"failures": [], "full": False}})
    assert "| 2 of 4 |" in text and "| 2026-01-02, abc1234 |" in text
    assert "- seed 1: it differs" in text
    assert "4 of 4 (a few trials only) | 75.00% |" in text
    assert "killed: 1; step: 4." in text and "how: 1 cut" in text
    assert "Not measured yet: F2, F3, F4 power, F5, F6, F7, F8, F9, F10, F11, F12." in text


def test_an_unknown_figure_is_refused() -> None:
    with pytest.raises(SystemExit, match="no figure F99; there are: F1, F2"):
        reliability.run(["F99"])


def test_a_figure_done_for_this_commit_is_not_repeated(
    measured: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(reliability, "RESULTS", tmp_path / "r.json")
    monkeypatch.setattr(reliability, "_commit", lambda: "abc1234")
    reliability.fsio.write_json(reliability.RESULTS, dict.fromkeys(FIGURES, measured))
    reliability.run([])
    assert capsys.readouterr().out.count("done for abc1234 already") == len(FIGURES)


def test_the_page_is_that_of_the_results() -> None:
    if not reliability.RESULTS.exists():
        pytest.skip("nothing was measured yet")
    expected = reliability.page(reliability._results())
    remedy = "run: python -m bench.reliability report"
    assert reliability.PAGE.read_text(encoding="utf-8") == expected, remedy
