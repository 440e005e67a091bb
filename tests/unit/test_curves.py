"""The curves of a run: read once, kept up with a log that grows, reduced to what can be seen."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest

from mule import logs
from mule.commands.columns import Columns, ColumnStore
from mule.commands.curves import MAX_POINTS, band, curves, extremes, marks
from mule.errors import UserError
from mule.run import Run


def _run(root: Path, name: str = "wave") -> Run:
    return Run.create(root, name, "model: {size: 1m}\n")


def _row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 3 + 1 / step, "num_targets": 10, "grad_norm": 0.5, **more}


def _write(run: Run, rows: list[dict[str, Any]]) -> None:
    with run.lock():
        run.start_attempt(from_step=0)
        for row in rows:
            run.log_metrics(row)


def _long_run(root: Path, num_rows: int) -> Run:
    """Written in one go, as if an update took 0.1 s."""
    run, rng = _run(root, "long"), random.Random(4)
    lines = [
        json.dumps({"at": 1000 + 0.1 * s, "attempt": 1, **_row(s, loss=3 + rng.gauss(0, 0.1))})
        for s in range(1, num_rows + 1)
    ]
    event = {"at": 1000.0, "attempt": 1, "kind": "started", "from_step": 0}
    (run.folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def _chart(found: dict[str, Any], name: str = "loss") -> dict[str, Any]:
    return next(chart for chart in found["charts"] if chart["name"] == name)


# ---------------------------------------------------------------- fewer points


def test_extremes_keep_the_ends_and_every_spike() -> None:
    rng = random.Random(1)
    values = [rng.random() for _ in range(10_001)]
    values[4321], values[77] = 9.0, -9.0
    kept = list(extremes(values, 200))
    assert len(kept) <= 200
    assert kept == sorted(set(kept))
    assert {0, 77, 4321, 10_000} <= set(kept)
    assert list(extremes(values[:200], 200)) == list(range(200))


@pytest.mark.parametrize("count", [0, 1, 2, 5, 399, 401, 1999, 2001])
def test_extremes_of_any_length(count: int) -> None:
    values = [math.sin(place) for place in range(count)]
    kept = list(extremes(values, 400))
    assert len(kept) <= 400
    assert kept == sorted(kept)
    if values:
        assert (kept[0], kept[-1]) == (0, count - 1)
        assert max(values[place] for place in kept) == max(values)
        assert min(values[place] for place in kept) == min(values)


# ---------------------------------------------------------------- ranges and axes


def test_charts_have_their_units_and_only_figures_that_are_there(tmp_path: Path) -> None:
    run = _run(tmp_path)
    memory = {"memory_bytes": 2**30, "share_of_peak": 0.25}
    _write(run, [_row(s, **memory) for s in range(1, 6)] + [_row(6, val_loss=3.5, **memory)])
    found = curves(Columns(run).refresh())
    assert [chart["name"] for chart in found["charts"]] == [
        "loss",
        "grad_norm",
        "memory",
        "share_of_peak",
    ]
    assert _chart(found, "memory")["traces"][0]["y"] == [1] * 6
    assert _chart(found, "share_of_peak")["told"]["last"] == 25
    loss, valid = _chart(found)["traces"]
    assert loss["label"] == "training"
    assert (valid["label"], valid["kind"], valid["x"], valid["y"]) == (
        "validation",
        "points",
        [6],
        [3.5],
    )
    assert _chart(found)["told"] == {
        "first": 4,
        "last": 3.166667,
        "lowest": 3.166667,
        "highest": 4,
    }


def test_each_axis_counts_its_own(tmp_path: Path) -> None:
    run = _long_run(tmp_path, 100)
    columns = Columns(run).refresh()
    for by, last in (("steps", 100), ("tokens", 1000), ("seconds", 10), ("hours", 10 / 3600)):
        found = curves(columns, by=by)
        assert found["whole"][1] == pytest.approx(last, rel=1e-6)
        assert _chart(found)["traces"][0]["x"][-1] == pytest.approx(last, rel=1e-6)
    with pytest.raises(UserError, match="no axis `miles`") as error:
        curves(columns, by="miles")
    assert error.value.hint == "one of steps, tokens, seconds, hours"


def test_a_range_shows_what_lies_in_it_and_one_point_on_either_side(tmp_path: Path) -> None:
    columns = Columns(_long_run(tmp_path, 100)).refresh()
    found = curves(columns, first=40, last=50)
    assert _chart(found, "grad_norm")["traces"][0]["x"] == list(range(39, 52))
    by_time = curves(columns, by="seconds", first=4, last=5)
    assert _chart(by_time)["traces"][0]["x"][0] == pytest.approx(3.9)
    assert _chart(curves(columns, first=1000, last=2000))["traces"][0]["x"] == [100]


def test_the_mean_is_that_of_the_updates_before_also_at_the_edge_of_a_range(
    tmp_path: Path,
) -> None:
    run = _run(tmp_path)
    _write(run, [_row(step, loss=float(step)) for step in range(1, 21)])
    columns = Columns(run).refresh()
    raw, mean = _chart(curves(columns, smooth=4))["traces"]
    assert (raw["kind"], mean["kind"]) == ("raw", "mean")
    assert raw["y"] == list(range(1, 21))
    assert mean["y"][:5] == [1, 1.5, 2, 2.5, 3.5]
    part = _chart(curves(columns, smooth=4, first=10, last=12))["traces"][1]
    assert dict(zip(part["x"], part["y"])) == {x: x - 1.5 for x in range(9, 14)}


def test_pauses_do_not_count_as_time(tmp_path: Path) -> None:
    run = _run(tmp_path)
    events = [
        {"at": 100.0, "attempt": 1, "kind": "started", "from_step": 0},
        {"at": 9000.0, "attempt": 2, "kind": "started", "from_step": 2},
    ]
    rows = [(1, 1, 101.0), (1, 2, 102.0), (1, 3, 103.0), (2, 3, 9001.5), (2, 4, 9002.5)]
    (run.folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    with (run.folder / "metrics.jsonl").open("w") as file:
        for attempt, step, at in rows:
            file.write(json.dumps({"at": at, "attempt": attempt, **_row(step)}) + "\n")
    assert list(Columns(run).refresh().seconds) == [1.0, 2.0, 3.5, 4.5]


def test_losses_of_each_source_are_traces_of_the_loss(tmp_path: Path) -> None:
    run = _run(tmp_path)
    by = {"val_loss": 3.0, "val_loss_by": {"books": 2.5, "code": None}}
    _write(run, [_row(1), _row(2, **by)])
    labels = [trace["label"] for trace in _chart(curves(Columns(run).refresh()))["traces"]]
    assert labels == ["training", "validation", "books"]


# ---------------------------------------------------------------- a log that grows


def test_only_what_was_added_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    read: list[int] = []
    real = logs.read_log_from

    def counted(path: Any, start: int) -> Any:
        rows, end = real(path, start)
        if Path(path).name == "metrics.jsonl":
            read.append(len(rows))
        return rows, end

    monkeypatch.setattr(logs, "read_log_from", counted)
    columns = Columns(run).refresh()
    assert len(columns) == 0
    with run.lock():
        run.start_attempt(from_step=0)
        for step in range(1, 11):
            run.log_metrics(_row(step))
        assert len(columns.refresh()) == 10
        run.log_metrics(_row(11))
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 12, "los')  # being written
        assert len(columns.refresh()) == 11
    assert read == [0, 10, 1]
    assert columns.refresh().figures["loss"].values[-1] == 3 + 1 / 11


def test_what_is_taken_back_leaves_the_curves(tmp_path: Path) -> None:
    run = _run(tmp_path)
    _write(run, [_row(step) for step in range(1, 9)])
    columns = Columns(run).refresh()
    with run.lock():
        run.start_attempt(from_step=5)
        run.log_metrics(_row(6, loss=9.0))
        assert list(columns.refresh().steps) == [1, 2, 3, 4, 5, 6]
        assert columns.figures["loss"].values[-1] == 9.0
        run.log_metrics(_row(6, loss=8.0, val_loss=4.0))  # an evaluation made up for
        assert list(columns.refresh().steps) == [1, 2, 3, 4, 5, 6]
        assert columns.figures["loss"].values[-1] == 8.0
        run.log_metrics(_row(7))
        run.log_event("rolled back", step=7, to=4, cause="a test")
        run.log_metrics(_row(8))
    assert list(columns.refresh().steps) == [1, 2, 3, 4, 8]


def test_another_run_in_its_place_is_read_anew(tmp_path: Path) -> None:
    run = _run(tmp_path)
    _write(run, [_row(step) for step in range(1, 9)])
    store = ColumnStore()
    assert store.use(run, len) == 8
    (run.folder / "metrics.jsonl").unlink()
    (run.folder / "events.jsonl").unlink()
    assert store.use(run, len) == 0
    _write(Run(run.folder), [_row(1), _row(2)])
    assert store.use(run, len) == 2


# ---------------------------------------------------------------- pins and forecasts


def test_findings_are_pinned_on_the_curve_that_their_rule_reads(tmp_path: Path) -> None:
    run = _long_run(tmp_path, 60)
    columns = Columns(run).refresh()
    findings = [
        {"code": code, "title": "trouble", "severity": "warning", "step": step}
        for code, step in (("D203", 30), ("D401", 40), ("D601", 70))
    ]
    with run.lock():
        run.start_attempt(from_step=60)
        run.log_event("stopped early", step=60, cause="a test")
    found = marks(columns.refresh(), findings, by="tokens")
    pins = [(pin["chart"], pin["x"], pin["y"]) for pin in found["findings"]]
    assert pins[0] == ("grad_norm", 300, 0.5)
    assert pins[1][:2] == ("loss", 400)
    assert 2.5 < pins[1][2] < 3.5
    assert pins[2] == ("memory", 700, None)  # there is no such curve: it stands on the edge
    assert [(event["kind"], event["x"]) for event in found["events"]] == [
        ("resumed", 600),
        ("stopped early", 600),
    ]
    assert marks(Columns(_run(tmp_path, "new")).refresh(), []) == {"findings": [], "events": []}


def test_a_forecast_is_a_band_from_now_to_the_end(tmp_path: Path) -> None:
    columns = Columns(_long_run(tmp_path, 60)).refresh()
    rows = [{"figure": "loss", "step": s, "low": 2.5, "high": 2.9} for s in (80, 100)]
    found = {
        "step": 60,
        "forecast": rows,
        "path": {"loss": [(60, 3.0), (80, 2.8), (100, 2.7)], "val_loss": []},
        "cannot": [{"what": "the validation loss", "why": "nothing was validated"}],
        "basis": "80% intervals",
    }
    drawn = band(columns, found, by="seconds")
    line = drawn["lines"]["loss"]
    assert line["x"] == pytest.approx([6, 8, 10])
    assert line["at"] == pytest.approx([6, 8, 10])
    assert (line["low"], line["high"]) == ([3, 2.5, 2.5], [3, 2.9, 2.9])
    assert list(drawn["lines"]) == ["loss"]
    assert drawn["cannot"][0]["why"] == "nothing was validated"


# ---------------------------------------------------------------- a long run


def test_a_long_run_is_read_once_and_then_drawn_quickly(tmp_path: Path) -> None:
    """A tenth of the run that docs/watch.md has the figures of; bounds for a busy machine."""
    run, store = _long_run(tmp_path, 10_000), ColumnStore()
    first = store.use(run, curves)
    assert {len(trace["x"]) for trace in _chart(first)["traces"]} == {MAX_POINTS}
    began = time.process_time()
    store.use(run, lambda columns: curves(columns, first=2000, last=6000))
    assert time.process_time() - began < 0.5
