"""bench/linear.py: slopes, what is left out of the table, and the page. No time is tested."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mule import machine
from mule.commands import docs
from mule.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "bench"
GIB = 2**30
STAMP = {"date": "2026-11-21", "machine": {"cpu": "A CPU", "cores": 2}}


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as for a script that is run
    return importlib.import_module("linear")


@pytest.fixture
def run(linear: ModuleType) -> ModuleType:
    return importlib.import_module("linear_run")


def _samples(rate_slope: float = 0.0, memory_slope: float = 0.0) -> list[dict[str, float]]:
    """100 samples with noise around straight lines, after a beginning that is far from them."""
    draw = random.Random(1)
    return [
        {
            "step": step,
            "tokens_per_second": 10.0
            if step <= 1000
            else 1000 + rate_slope * step + draw.gauss(0, 5),
            "rss_bytes": 1000 if step <= 1000 else GIB + memory_slope * step + draw.gauss(0, 100),
            "loss": 1.0,
        }
        for step in range(100, 10_100, 100)
    ]


def test_the_slope_of_a_line_is_found_and_its_interval_holds_it(run: ModuleType) -> None:
    slope, width = run.line([1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 9.0, 11.0])
    assert (slope, width) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-9))
    covered = 0
    for seed in range(200):
        draw = random.Random(seed)
        xs = [float(x) for x in range(90)]
        slope, width = run.line(xs, [0.3 * x + draw.gauss(0, 4) for x in xs])
        covered += abs(slope - 0.3) <= width
    assert 180 <= covered <= 199  # 95% of 200


def test_no_slope_is_told_from_one(run: ModuleType) -> None:
    found = run.slopes(_samples())
    assert (found["rate_verdict"], found["memory_verdict"]) == ("No slope", "No slope")
    assert found["tokens_per_second"] == pytest.approx(1000, rel=0.01)  # the beginning is not in it
    slower = run.slopes(_samples(rate_slope=-0.01))  # 10% in 10,000 updates
    assert (slower["rate_verdict"], slower["memory_verdict"]) == ("There is a slope", "No slope")
    assert slower["rate_change"][0] == pytest.approx(-0.1, rel=0.1)
    leaking = run.slopes(_samples(memory_slope=4096))
    assert (leaking["rate_verdict"], leaking["memory_verdict"]) == ("No slope", "There is a slope")
    assert leaking["bytes_per_update"][0] == pytest.approx(4096, rel=0.01)
    assert run.slopes(_samples(memory_slope=512))["memory_verdict"] == "No slope"  # too little


def test_a_verdict_needs_a_narrow_interval(run: ModuleType) -> None:
    assert run.verdict((0.5, 0.6), bound=0.2) == "No slope"  # 0 is within
    assert run.verdict((0.1, 0.01), bound=0.2) == "No slope"  # below what matters
    assert run.verdict((-0.7, 0.6), bound=0.2) == "There is a slope"
    assert run.verdict((0.5, 1.1), bound=0.2) == "Too noisy to tell"


def test_a_run_is_sampled_from_its_log(
    run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "metrics.jsonl"
    assert run.new_rows(log, 0) == ([], 0)
    rows = [
        {"step": step, "at": 100 + step / 2, "num_targets": 64, "loss": 3.0}
        for step in range(1, 41)
        if step != 30  # refused
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    log.write_text(text + '{"step": 41, "at"')  # a line that is being written
    ended = iter([None, 0])
    child = SimpleNamespace(pid=os.getpid(), poll=lambda: next(ended))
    samples = run.watch(child, log, 40, 10)
    assert [s["step"] for s in samples] == [20, 31, 40]
    assert {s["tokens_per_second"] for s in samples} == {128.0}  # 10 updates of 64 in 5 s
    assert all(s["rss_bytes"] > 1e6 for s in samples)
    assert "long: 40 of 40, 128 tokens/s" in capsys.readouterr().out
    assert run.memory_bytes(2**22 + 1) == 0  # no process


def test_a_run_that_ends_early_is_no_result(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "watch", lambda *_: [])
    monkeypatch.setattr(run.sys, "executable", "/bin/true")
    with pytest.raises(UserError, match="the long run ended early"):
        run.long_run(1000, (), text_words=10)


def test_what_is_given_replaces_a_default(run: ModuleType) -> None:
    assert run.settings(("a.b=1", "c.d=2"), ("a.b=3",)) == ["c.d=2", "a.b=3"]
    assert len(run.made_up_text(1000).split()) == 1000


def test_the_words_of_run(linear: ModuleType) -> None:
    parts, plan = linear.plan_of(["long", "steps=500", "minutes=1.5", "train.compile=false"])
    assert (parts, plan.steps, plan.minutes) == (["long"], 500, 1.5)
    assert plan.words == ("train.compile=false",)
    assert linear.plan_of([])[1] == linear.Plan()
    with pytest.raises(UserError, match="no part called `short`"):
        linear.plan_of(["short"])
    with pytest.raises(UserError, match="`step` says nothing here"):
        linear.plan_of(["step=5"])


def _cell(size: str, length: int, predicted_s: float, **found: Any) -> dict[str, Any]:
    return {
        "size": size,
        "length": length,
        "words": [],
        "params": {"1m": 1e6, "10m": 1e7}[size],
        "micro_batch_rows": 2,
        "precision": "bf16",
        "tokens_per_update": 2 * length,
        "flops_per_token": 6e6,
        "needed_bytes": GIB,
        "predicted_s": predicted_s,
        **found,
    }


def test_a_cell_is_left_out_for_want_of_memory_or_time(
    linear: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 3 * GIB)
    large = _cell("10m", 64, 60.0, needed_bytes=8 * GIB)
    assert linear.measured(large, tmp_path, 1000.0) == {"left_out": "needs about 8 GiB"}
    assert linear.measured(_cell("10m", 64, 120.0), tmp_path, 100.0) == {
        "left_out": "would take about 2 min"
    }
    ran = SimpleNamespace(returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(linear.subprocess, "run", lambda *_, **__: ran)
    assert linear.measured(_cell("1m", 64, 1.0), tmp_path, 100.0) == {"left_out": "ended with -9"}


def test_the_quick_cells_come_first_within_the_time(
    linear: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def measured(cell: dict[str, Any], cache: Path, seconds_left: float) -> dict[str, Any]:
        asked.append((cell["size"], cell["length"]))
        assert seconds_left <= 60 * 20
        return {"left_out": "not now"}

    monkeypatch.setattr(linear, "measured", measured)
    monkeypatch.setattr(linear.bench.machine, "cpp_compiler_problem", lambda: None)
    monkeypatch.setattr(machine, "matmul_peak", lambda *_, **__: 1e12)
    words = ("train.device=cpu", "train.precision=fp32", "train.step_rows=2")
    found = linear.table(linear.Plan(sizes=("10m", "1m"), lengths=(256, 64), words=words))
    assert asked == [("1m", 64), ("1m", 256), ("10m", 64), ("10m", 256)]
    small = found["cells"][0]
    assert small["tokens_per_update"] == 128 and small["micro_batch_rows"] == 2
    assert small["needed_bytes"] > 16 * small["params"] + linear.OVERHEAD_BYTES
    assert small["predicted_s"] > linear.START_S
    assert found["peaks"] == [1e12, 1e12]


def test_a_cell_measures_whole_updates(linear: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setattr(linear, "TIMED_S", 0.0)
    words = [
        *("model.size=1m", "model.vocab_size=64", "data.max_seq_length=8", "train.step_rows=3"),
        *("train.device=cpu", "train.precision=fp32", "train.threads=1", "train.compile=false"),
    ]
    found = linear.measure_cell(words)
    torch.set_num_threads(threads)
    assert len(found["updates_s"]) == linear.TIMED
    assert found["tokens_per_second"] == pytest.approx(2 * 24 / sum(found["updates_s"]))
    assert found["peak_bytes"] > 1e7


def _results(linear: ModuleType, run: ModuleType, file: Path) -> Path:
    measured = {"tokens_per_second": 1000.0, "peak_bytes": 2 * GIB}
    cells = [
        _cell("10m", 256, 9.0, left_out="would take about 5 min"),
        _cell("1m", 256, 5.0, **measured),
    ]
    long = {"steps": 10_000, "words": ["model.size=1m"], "every": 100, "command": linear.COMMAND}
    long |= run.slopes(_samples(memory_slope=4096)) | {"samples": []}
    table = {"command": linear.COMMAND, "minutes": 40.0, "peaks": [5e10, 6e10], "cells": cells}
    file.write_text(json.dumps({"long": long | STAMP, "table": table | STAMP}))
    return file


def test_the_section_says_whether_there_is_a_slope(
    linear: ModuleType, run: ModuleType, tmp_path: Path
) -> None:
    text = linear.section(_results(linear, run, tmp_path / "linear.json"))
    assert "**10,000 updates** of `mule train` (model.size=1m), a sample every 100" in text
    speed, memory = (line for line in text.splitlines() if line.startswith("- "))
    assert "% in 10,000 updates (95% interval: " in speed and speed.endswith("**No slope.**")
    assert "+4,09" in memory and memory.endswith("**There is a slope.**")
    assert "below 2% of the speed in 10,000 updates, or 1,024 bytes an update" in text
    small, large = (line for line in text.splitlines() if line.startswith("| `"))
    assert small == "| `1m` | 1.0 M | 256 | 2 | 1,000 | 10.0% | 2.00 GiB |"  # of the higher peak
    assert large == "| `10m` | 10.0 M | 256 | 2 | left out: would take about 5 min | | |"
    for command in (linear.COMMAND, f"{linear.COMMAND} minutes=40"):
        assert f"A CPU, 2 cores, 2026-11-21; `{command}`." in text


def test_a_finished_part_is_kept_beside_the_other(
    linear: ModuleType, run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = _results(linear, run, tmp_path / "linear.json")
    monkeypatch.setattr(linear, "RESULTS", file)
    monkeypatch.setattr(linear, "report", lambda: None)
    monkeypatch.setattr(linear, "long_run", lambda *_: {"steps": 7})
    linear.run(["long"], linear.Plan())
    kept = json.loads(file.read_text())
    assert kept["long"]["steps"] == 7 and kept["long"]["command"] == linear.COMMAND
    assert len(kept["table"]["cells"]) == 2
    assert math.isfinite(kept["long"]["machine"]["cores"])


def test_the_page_shows_what_was_measured(linear: ModuleType) -> None:
    page = linear.PAGE.read_text(encoding="utf-8")
    fresh = docs.with_generated(page, linear.section(), "linear")
    assert page == fresh, "run: python bench/linear.py report"
    assert "Nothing is measured yet" in linear.section(Path("nowhere.json"))
    assert not linear.RESULTS.match("train*.json")  # what `mule bench report` reads


def test_the_scripts_are_found_as_scripts(linear: ModuleType) -> None:
    assert Path(str(linear.__file__)).parent == SCRIPTS
    assert sys.modules["linear_run"].ROOT == SCRIPTS.parent
