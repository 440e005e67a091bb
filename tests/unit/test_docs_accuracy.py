"""docs/accuracy.md says what the benches measured, and what was not measured yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule import fsio
from mule.commands.docs_accuracy import accuracy_markdown

MACHINE = {"cpu": "a processor", "cores": 2}


def plan() -> dict[str, Any]:
    case: dict[str, Any] = {
        "name": "1m, 8 x 128",
        "fits": False,
        "predicted": {"peak_bytes": 400 * 2**20, "update_s": 0.25},
        "measured": {"peak_bytes": 500 * 2**20, "update_s": 0.2},
        "error": {"peak_bytes": -0.2, "update_s": 0.25},
    }
    summary = {
        "runs": 1,
        "memory": {"runs": 1, "median_error": 0.2, "p95_error": 0.2},
        "time": {"runs": 1, "median_error": 0.25, "p95_error": 0.25},
        "fits_that_did_not": ["1m, 8 x 128"],
    }
    said = {"command": "python bench/plan.py run", "date": "2026-11-22", "machine": MACHINE}
    return said | {"cases": [case], "summary": {"held out": summary}}


def doctor() -> dict[str, Any]:
    recall = {"runs": 5, "found": 4, "interval": [0.38, 0.96], "median_share": 0.3}
    fault = {"fault": "frozen", "title": "all weights frozen", "expected": ["D102"], **recall}
    alarm = {"run": "healthy-1", "setting": "small batch", "codes": ["D204"]}
    healthy = {"runs": 40, "false_alarms": 1, "interval": [0.0, 0.13], "which": [alarm]}
    repeating = {"runs": 9, "told": 8, "least_share": 0.47, "other_codes": ["D204"]}
    part = {"recall": recall, "faults": [fault], "healthy": healthy, "repeating": repeating}
    return {"held-out": part, "commands": ["python -m bench.doctor report"], "date": "2026-11-22"}


def forecast() -> dict[str, Any]:
    row = {
        "figure": "val_loss",
        "share": 0.5,
        "kind": "all",
        "num_runs": 61,
        "covered": 0.62,
        "band": [0.7, 0.9],
        "inside_band": False,
        "median_error": 0.021,
        "median_error_last_value": 0.3,
        "median_error_straight_line": 0.4,
    }
    verdicts = {"said and came": 7, "said, did not come": 1, "came unsaid": 2, "neither": 50}
    return {
        "command": "python -m bench.forecast run",
        "date": "2026-11-22",
        "num_runs": 61,
        "num_data_sets": 9,
        "rows": [row, row | {"share": 0.4}, row | {"kind": "fine-tune"}],
        "verdicts": verdicts,
    }


def test_what_is_not_measured_is_said_with_its_command(tmp_path: Path) -> None:
    page = accuracy_markdown(tmp_path)
    for command in ("make bench-plan", "bench.doctor run part=held-out", "bench.forecast run"):
        assert f"Not measured yet: `{command}" in page.replace("`python -m ", "`")


def test_every_figure_of_the_benches_is_there(tmp_path: Path) -> None:
    for name, found in (("plan", plan()), ("doctor", doctor()), ("forecast", forecast())):
        fsio.write_json(tmp_path / f"{name}.json", found)
    page = accuracy_markdown(tmp_path)
    assert "Not measured" not in page
    assert (
        "- **held out**, 1 runs: median error of memory 20.0% (95% of runs within 20%), of time "
        "25.0% (95% of runs within 25%); 1 would have been said to fit that did not"
    ) in page
    row = "| 1m, 8 x 128 | held out | 400 MiB | 500 MiB | -20% | 0.250 s | 0.200 s | +25% |"
    assert row in page
    assert "**4 of 5 faults found** (38% to 96%), known after 30% of the run (median)" in page
    assert "**1 of 40 healthy runs with a warning** (0% to 13%)" in page
    assert "of which 47% or more are equal to one before" in page
    assert "(D501) of 8 of them; it also says D204" in page
    assert "counted as first set out, it would be 9 of 49" in page
    assert "| all weights frozen | 4 of 5 | 38% to 96% | D102 | 30% of the run |" in page
    assert "- small batch: D204" in page
    outside = "| validation loss at the end | 50% | 61 | 62% (outside) | 70% to 90% | 0.021 |"
    assert page.count(outside) == 1 and "| 40% |" not in page
    assert (
        "told right at half of the run in 57 of 60 runs: 7 rises foreseen, 2 not, 1 false" in page
    )


def test_a_bench_that_was_cut_off_counts_as_not_measured(tmp_path: Path) -> None:
    cut = plan()
    del cut["cases"][0]["error"]
    fsio.write_json(tmp_path / "plan.json", cut)
    assert "Not measured yet: `make bench-plan`" in accuracy_markdown(tmp_path)
