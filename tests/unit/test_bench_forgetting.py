"""bench/forgetting.py: every way once at a tiny size, and the table. No figure is tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from mule import fsio, machine
from mule.commands import docs

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as it sees itself when it is run, with a made-up peak of the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_measure_peak", lambda *_: 1e11)
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("forgetting")


@pytest.mark.slow
def test_every_way_is_measured(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench.smoke()
    seed = found["seeds"]["0"]
    assert seed.keys() == {"before", *bench.WAYS}
    for measured in seed.values():
        assert measured["updates"] > 0
        assert all(measured[key] > 0 for key in ("seconds", "old_loss", "new_loss"))
    assert seed["afresh"]["updates"] == seed["merge-warm"]["updates"] > seed["warm"]["updates"]
    assert seed["short"]["updates"] == seed["warm"]["updates"]
    assert found["rows"]["old"] > 0 < found["rows"]["new"]
    assert str(tmp_path) not in json.dumps(found)
    assert len(capsys.readouterr().out.splitlines()) == len(bench.WAYS)


def test_the_table(bench: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "forgetting.json"
    assert bench.table(file) == "Not measured yet: `python bench/forgetting.py run`.\n"

    def way(old: float, new: float) -> dict[str, float]:
        return {"updates": 40, "seconds": 8.0, "old_loss": old, "new_loss": new}

    seeds = {
        str(seed): {"before": way(0.5, 2.0)}
        | {name: way(0.5 + seed, 1.0 - seed / 4) for name in bench.WAYS}
        for seed in (0, 1)
    }
    fsio.write_json(file, bench.described(bench.TINY, {"old": 10, "new": 12}, seeds))
    lines = bench.table(file).splitlines()
    assert lines[2] == "| before: the tuned model | 40 | 8 | 0.500 |  | 2.000 |  |"
    assert lines[4] == (
        "| warm start, new data only | 40 | 8 | 1.000 | +0.500 (+0.000 to +1.000) "
        "| 0.875 | -1.125 (-1.250 to -1.000) |"
    )
    assert "Means over 2 seeds" in lines[-1]
    assert "10 old and 12 new chats" in lines[-1]


def test_the_page_shows_what_is_measured(bench: ModuleType) -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    remedy = "python bench/forgetting.py report"
    assert page == docs.with_generated(page, bench.table(), "forgetting"), remedy
