"""bench/quantise.py: its model, Mule's own ways and the table. The native build is not run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mule.commands import docs
from mule.errors import UserError

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as it sees itself when it is run."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("quantise")


def _found(seconds: float, **more: Any) -> dict[str, Any]:
    return {"seconds": seconds, "cpu_seconds": 2 * seconds, "version": "1.2"} | more


def test_mules_ways_give_the_same_tensors(bench: ModuleType, tmp_path: Path) -> None:
    folder = bench.write_model(tmp_path / "model", bench.TINY)
    for way in ("file", "folder"):
        found = bench.one(way, folder, "q4_k_m")
        assert found["seconds"] > 0 and found["version"].startswith("xllamacpp ")
    first, second = (bench._out(folder, way, "q4_k_m") for way in ("file", "folder"))
    assert bench._tensors(first) == bench._tensors(second)


def test_the_table(bench: ModuleType, tmp_path: Path) -> None:
    rounds = [
        {
            "native": _found(native),
            "file": _found(own, identical_tensors=9, tensors=9),
            "folder": _found(2 * own, identical_tensors=8, tensors=9),
        }
        for native, own in ((4.0, 2.0), (3.0, 3.0), (9.0, 10.0))
    ]
    file = tmp_path / "quantise.json"
    file.write_text(json.dumps({"types": {"q4_k_m": bench._described(rounds)}}))
    lines = bench.table(file).splitlines()
    assert lines[3] == (
        "| q4_k_m | **Mule**, from the f16 file | 3.00 | **100%** | 6.00 | 100% | 9 of 9 the same |"
    )
    assert "| 6.00 | **50%** |" in lines[4] and "8 of 9 the same" in lines[4]
    assert "rounds: 3, 2 threads" in lines[6]


def test_the_page_is_fresh(bench: ModuleType) -> None:
    page = bench.PAGE.read_text()
    assert page == docs.with_generated(page, bench.table(), "quantise"), (
        "run: python bench/quantise.py report"
    )
    assert "Not measured yet: `python bench/quantise.py setup`" in bench.table(Path("nowhere.json"))


def test_what_cannot_be_measured_is_refused(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="there is no type called `q2_k` here"):
        bench.run(["q2_k"])
    monkeypatch.setattr(bench, "LIBRARIES", tmp_path / "none")
    with pytest.raises(UserError, match="is missing") as error:
        bench._round(tmp_path, "q8_0", "x")
    assert error.value.hint == "fetch it: python bench/quantise.py setup"
