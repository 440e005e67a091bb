"""The bench of forecasts: which runs count, what is tried of them, how it is judged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench import forecast as bench
from bench.forecast_cases import cases_below, doublings, tries
from bench.forecast_runs import SPEC, specs
from mule import fsio
from mule.plan.forecast_errors import END, SHARES
from mule.plan.outlook import Point
from tests.forecast_curves import course, curve, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    for name, steps, twice in (("short", 100, False), ("long", 200, True)):
        run = course(steps, warmup_steps=5)
        write_run(folder / name / "runs", name, curve(run, every=10))
        spec = {"group": "one", "data": "stories", "twice": twice, "half": False}
        fsio.write_json(folder / name / SPEC, spec)
    write_run(folder / "broken" / "runs", "broken", curve(course(100)), until=60)
    write_run(folder / "faulty" / "runs", "faulty", curve(course(100)))
    fsio.write_json(folder / "faulty" / "case.json", {"fault": "shuffled labels"})
    return folder


def test_healthy_finished_runs_count(folder: Path) -> None:
    cases = cases_below([folder])
    assert {case.run.name for case in cases} == {"short", "long"}
    assert {case.group for case in cases} == {"stories"}


def test_what_is_tried_of_a_run(folder: Path) -> None:
    case = next(case for case in cases_below([folder]) if case.run.name == "long")
    found = list(tries(case))
    ends = [t for t in found if (t.figure, t.ahead) == ("val_loss", END)]
    assert [t.share for t in ends] == list(SHARES[1:])  # at 15% it is too young
    assert {t.actual for t in ends} == {case.curve.valid[-1][1]}
    assert next(t for t in ends if t.share == 0.5).last == dict(case.curve.valid)[100]
    assert not [t for t in found if t.figure == "best_val_loss" and t.ahead != END]


def test_a_run_twice_as_long_is_what_doubling_is_held_against(folder: Path) -> None:
    found = list(doublings(cases_below([folder])))
    assert {(t.share, t.figure) for t in found} == {(0.5, "doubled"), (1.0, "doubled")}
    long = next(case for case in cases_below([folder]) if case.run.name == "long")
    assert {t.actual for t in found} == {long.best}


def test_intervals_are_judged_with_the_errors_of_other_data() -> None:
    """Group b is off by ten units: judged by a's errors it is never covered, nor a by b's."""

    def trial(group: str, place: int, shift: float) -> bench.Try:
        point = Point(10, 1.0, 0.1)
        actual = 1.0 + 0.1 * (shift + place / 10)
        return bench.Try(group, "new model", "val_loss", 0.5, END, point, actual, 2.0, 3.0)

    alike = [trial(group, place, 0.0) for group in "ab" for place in range(20)]
    (row, *_) = bench.judged(alike)
    assert row["num_runs"] == 40 and row["kind"] == "all" and row["inside_band"]
    assert row["covered"] == pytest.approx(0.8, abs=0.1)
    assert row["median_error_last_value"] > row["median_error"]
    apart = [trial(group, place, 10.0 * (group == "b")) for group in "ab" for place in range(20)]
    (row, *_) = bench.judged(apart)
    assert row["covered"] == 0.0 and not row["inside_band"]


def test_the_table_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "figure": "val_loss",
        "share": 0.5,
        "kind": "all",
        "num_runs": 60,
        "covered": 0.6,
        "band": [0.7, 0.9],
        "inside_band": False,
        "median_error": 0.0123,
        "median_width": 0.1,
        "median_error_last_value": 0.2,
        "median_error_straight_line": 0.3,
    }
    told = {"said and came": 2, "said, did not come": 1, "came unsaid": 3, "neither": 4}
    result = {"rows": [row], "verdicts": told, "num_runs": 60, "num_data_sets": 9}
    fsio.write_json(
        tmp_path / "found.json", result | {"command": "a command", "date": "2026-01-01"}
    )
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "found.json")
    shutil.copy(bench.PAGE, page := tmp_path / "forecast.md")
    monkeypatch.setattr(bench, "PAGE", page)
    bench.report()
    text = page.read_text()
    assert "| validation loss at the end | 50% | 60 | 60% (outside) | 70% to 90% |" in text
    assert "| 70% to 90% | 0.012 | 0.200 | 0.300 |\n" in text
    assert "told right at half of the run in 6 of 10 runs" in text and "`a command`" in text


def test_every_base_is_trained_before_what_begins_with_it() -> None:
    found = specs()
    names = [spec.name for spec in found]
    assert len(set(names)) == len(names) >= 60
    for place, spec in enumerate(found):
        assert spec.base is None or spec.base in names[:place]
    assert {spec.filled(1)["train.steps"] for spec in found if spec.group == "web-few"} == {90, 180}
