"""Forecasts of finished runs from their beginnings, against what came.

    python -m bench.forecast train [DATA]     # small runs into ~/.cache/mule/bench/forecast
    python -m bench.forecast run [FOLDER ...] # those and the runs below the folders, tried
    python -m bench.forecast report           # the table of docs/forecast.md

At 15%, a quarter, half, three quarters and nine tenths of each run its end is forecast from what
was known then. The errors give the intervals that Mule uses (mule/plan/forecast_errors.json). To
judge those intervals, each run is tried with the errors of runs on other data sets alone.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.doctor_data import Folder
from bench.forecast_cases import Case, Try, befores, cases_below, doublings, tries
from bench.forecast_runs import CACHE, train_all
from mule import __version__, fsio, machine
from mule.commands.docs import with_generated
from mule.commands.docs_accuracy import forecast_markdown
from mule.config import docs as settings
from mule.plan import forecast_errors
from mule.plan.forecast_errors import END, Table
from mule.statistics import binomial_band

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "forecast.json"
PAGE = settings.DOCS / "forecast.md"
DATA = ROOT.parent / "shared" / "data"
COVERED = 0.8


def run(folders: Sequence[Path]) -> None:
    """Try all runs, judge the forecasts, and keep the errors for the product."""
    started_at = time.perf_counter()
    cases = cases_below([CACHE, *folders])
    found: list[Try] = []
    for place, case in enumerate(cases, start=1):
        found += tries(case)
        if place % 10 == 0:
            seconds = time.perf_counter() - started_at
            print(f"{place}/{len(cases)} runs tried, {seconds:.0f} s", flush=True)
    found += doublings(cases)
    found += befores(cases)
    result = {
        "bench": "forecast",
        "command": "python -m bench.forecast run" + " FOLDER" * len(folders),
        "date": datetime.date.today().isoformat(),
        "mule": __version__,
        "seconds": round(time.perf_counter() - started_at),
        "num_runs": len(cases),
        "num_data_sets": len({case.group for case in cases}),
        "rows": judged(found),
        "verdicts": verdicts(cases),
        "runs": [case.as_row() for case in cases],
        "machine": machine.describe(),
    }
    fsio.write_json(RESULTS, result)
    table = Table.learned((trial.key, trial.error) for trial in found)
    fsio.write_json(
        forecast_errors.FILE,
        {key: result[key] for key in ("command", "date", "num_runs", "num_data_sets")}
        | {"levels": list(forecast_errors.LEVELS), "cells": table.as_rows()},
    )
    report()


def judged(found: Sequence[Try]) -> list[dict[str, Any]]:
    """For each figure and share: how often the interval held, and how far off it and others were."""
    rows = []
    for figure, share in sorted({(trial.figure, trial.share) for trial in found}):
        own = [t for t in found if (t.figure, t.share) == (figure, share) and t.ahead == END]
        for kind in ("all", "new model", "fine-tune"):
            some = [trial for trial in own if kind in ("all", trial.kind)]
            if row := _judged(some, found):
                rows.append({"figure": figure, "share": share, "kind": kind, **row})
    return rows


def _judged(own: Sequence[Try], found: Sequence[Try]) -> dict[str, Any] | None:
    """Of forecasts of one figure at one share, each with the errors on other data sets."""
    tables = {
        group: Table.learned((t.key, t.error) for t in found if t.group != group)
        for group in {trial.group for trial in own}
    }
    hits, misses, widths = 0, [], []
    for trial in own:
        errors = tables[trial.group].errors(trial.kind, trial.figure, trial.share, 1.0)
        if errors is None:
            return None
        low, middle, high = (
            trial.point.predicted + errors.at(level) * trial.point.scale
            for level in (forecast_errors.LOW, 0.5, forecast_errors.HIGH)
        )
        hits += low <= trial.actual <= high
        misses.append(abs(trial.actual - middle))
        widths.append(high - low)
    if not own:
        return None
    least, most = binomial_band(len(own), COVERED)
    return {
        "num_runs": len(own),
        "covered": round(hits / len(own), 3),
        "band": [round(least / len(own), 3), round(most / len(own), 3)],
        "inside_band": least <= hits <= most,
        "median_error": round(median(misses), 4),
        "median_width": round(median(widths), 4),
        "median_error_last_value": round(median(abs(t.actual - t.last) for t in own), 4),
        "median_error_straight_line": round(median(abs(t.actual - t.line) for t in own), 4),
    }


def verdicts(cases: Iterable[Case]) -> dict[str, Any]:
    """What was said at half of each run about a rise of the validation loss, and what came."""
    counts = {"said and came": 0, "said, did not come": 0, "came unsaid": 0, "neither": 0}
    for case in cases:
        if (both := case.rise()) is not None:
            said, came = both
            name = ("said and came" if came else "said, did not come") if said else None
            counts[name or ("came unsaid" if came else "neither")] += 1
    return counts


def report() -> None:
    """Write the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    table = forecast_markdown(fsio.read_json(RESULTS))
    fsio.write_text(PAGE, with_generated(text, f"{table}\n", "accuracy"))


def main(words: list[str]) -> None:
    command, *rest = words or ["report"]
    if command == "train":
        train_all(CACHE, Folder(Path(rest[0]) if rest else DATA))
    elif command == "run":
        run([Path(word) for word in rest])
    else:
        report()


if __name__ == "__main__":
    main(sys.argv[1:])
