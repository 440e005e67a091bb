"""The measurement of long curves measures what it says."""

from __future__ import annotations

from pathlib import Path

from bench.curves import measure


def test_a_small_one_has_every_figure(tmp_path: Path) -> None:
    found = measure(tmp_path, 300, 2)
    assert (found["updates"], found["runs"]) == (300, 2)
    assert found["log_bytes"] > 300 * 200
    assert all(value >= 0 for name, value in found.items() if name.endswith("_s"))
    assert 0 < found["sent_bytes"] < 400_000
