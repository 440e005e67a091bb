"""The bench of the pages: its long run, its figures, and what docs/ui.md says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import ui
from mule import fsio
from mule.commands import docs_ui
from mule.run import Run
from tests.browser.visitor import missing

FOUND = {
    "date": "2026-11-22",
    "command": "python -m bench.ui run",
    "machine": {"cpu": "a processor", "cores": 2},
    "browser": "Chromium 150",
    "rounds": 5,
    "points": 100_000,
    "opening": {
        "first_paint_ms": 81.4,
        "listed_ms": 402.0,
        "requests": 7,
        "bytes": 20_480,
        "other_places": 0,
    },
    "run": {
        "curves_ms": 1204.0,
        "bytes": 40_960,
        "zoom_ms": 130.0,
        "longest_frame_ms": 33.0,
    },
    "server": {"memory_bytes_before": 100 * 2**20, "memory_bytes_after": 130 * 2**20},
}


def test_the_long_run_is_one(tmp_path: Path) -> None:
    ui.write_long_run(tmp_path, 300)
    run = Run.open(ui.LONG, tmp_path / "runs")
    rows = run.metrics()
    assert len(rows) == 300 and run.state() == "finished"
    assert rows[99]["val_loss"] > rows[99]["loss"] and "val_loss" not in rows[0]
    assert len(list((tmp_path / "runs").iterdir())) == 21


def test_what_the_page_says(tmp_path: Path) -> None:
    assert docs_ui.speed_markdown(tmp_path) == "Not measured yet: `python -m bench.ui run`.\n"
    fsio.write_json(tmp_path / "ui.json", FOUND)
    text = docs_ui.speed_markdown(tmp_path)
    assert "| first paint | **81 ms** |" in text
    assert "| requests until then | **7, 20 KiB, 0 to other places** |" in text
    assert "| from a click to the curves of the long run | **1,204 ms** |" in text
    assert "a processor, 2 cores without a GPU" in text and "100,000 updates" in text
    assert text.endswith("2026-11-22, `python -m bench.ui run`.\n")


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")
def test_the_bench_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "ROUNDS", 1)
    monkeypatch.setattr(ui, "POINTS", 5_000)
    found = ui.run()
    assert found["opening"]["first_paint_ms"] > 0 and found["opening"]["other_places"] == 0
    assert found["run"]["zoom_ms"] > 0 and found["run"]["bytes"] > 1_000
    assert found["points"] == 5_000 and found["server"]["memory_bytes_after"] > 2**20
