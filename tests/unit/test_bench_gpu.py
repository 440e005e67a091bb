"""bench/gpu.py: the job, the cards and the table. Nothing is measured here."""

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
    return importlib.import_module("gpu")


def _way(rate: float) -> dict[str, Any]:
    return {
        "tokens_per_second": rate,
        "updates_s": [1.0, 1.25, 1.5],
        "rows_at_once": 64,
        "peak_bytes": 20 * 2**30,
        "reserved_bytes": 24 * 2**30,
        "first_update_s": 40.0,
        "versions": {"torch": "2.13.0"},
    }


@pytest.fixture
def results(bench: ModuleType, tmp_path: Path) -> Path:
    """What `run` writes for an H100 that reaches 600 TFLOP/s in products."""
    job = bench.gpu_job("124m", tmp_path, "cuda")
    found = {"peaks": [580e12, 600e12], "mule-bf16": _way(600_000.0), "plain": _way(500_000.0)}
    described = bench._described(job, found, "NVIDIA H100 80GB HBM3") | {"flops_per_token": 8e8}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(described))
    return file


def test_an_update_has_524288_tokens(bench: ModuleType, tmp_path: Path) -> None:
    job = bench.gpu_job("124m", tmp_path, "cuda")
    assert (job.rows * job.row_length, job.row_length, job.precision) == (524_288, 1024, "bf16")
    assert job.warm_up + job.timed < bench.PLANNED_UPDATES


@pytest.mark.parametrize(
    ("card", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_the_published_peak_is_found_by_name(bench: ModuleType, card: str, teraflops: int) -> None:
    assert bench.published_flops(card) == teraflops * 1e12
    assert bench.published_flops("NVIDIA Imaginary 1") is None


def test_mfu_is_of_the_published_peak(bench: ModuleType, results: Path) -> None:
    text = bench.table(results)
    # 600,000 tokens/s x 0.8 GFLOP = 480 TFLOP/s, of 989 published and 600 measured
    assert "| **Mule**, bf16 | 600,000 | **48.5%** | 80.0% | 1.250 s (1.000-1.500) | 64 |" in text
    assert "| 20.0 (24.0) GiB | 40 s |" in text
    assert "In bf16 Mule makes **1.20 times** the tokens a second of the plain step" in text
    assert "512 rows of 1,024 tokens an update; 10 timed updates after 3" in text
    assert "989 TFLOP/s published, 600 measured" in text
    assert "fp8" not in text  # it was not measured
    assert str(results.parent) not in results.read_text()


def test_a_card_without_a_known_peak_has_no_mfu(bench: ModuleType, results: Path) -> None:
    known = json.loads(results.read_text())
    results.write_text(json.dumps(known | {"card": "NVIDIA Imaginary 1", "published_flops": None}))
    text = bench.table(results)
    assert "| **Mule**, bf16 | 600,000 | - | 80.0% |" in text
    assert "NVIDIA Imaginary 1: no published peak known, 600 measured" in text


def test_the_page_shows_what_was_measured(bench: ModuleType, tmp_path: Path) -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    fresh = docs.with_generated(page, bench.table(), "gpu")
    assert page == fresh, "run: python bench/gpu.py report"
    assert bench.table(tmp_path / "nowhere.json").startswith("Not measured yet")


def test_without_a_card_nothing_is_measured(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA card here to measure"):
        bench.main(["run"])
    with pytest.raises(UserError, match="no way called `mule`") as caught:
        bench.main(["run", "mule"])
    assert caught.value.hint == "some of mule-bf16, mule-fp8, plain"


def test_float8_is_left_out_where_it_cannot_run(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert bench._possible(torch) == ["mule-bf16", "plain"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert bench._possible(torch) == list(bench.WAYS)


def test_the_fp8_way_is_given_fp8(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def one_way(way: Any, job: Any, cache: Path) -> dict[str, Any]:
        asked.append((way.title, job.precision))
        return _way(1.0)

    monkeypatch.setattr(bench, "one_way", one_way)
    bench._all(bench.gpu_job("124m", tmp_path, "cuda"), list(bench.WAYS))
    assert asked == [
        ("**Mule**, bf16", "bf16"),
        ("**Mule**, fp8", "fp8"),
        ("plain step, bf16", "bf16"),
    ]


def test_a_planned_run_is_stopped_when_its_updates_are_logged(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_run

    sent: list[int] = []
    log = tmp_path / "metrics.jsonl"

    def sleep(seconds: float) -> None:  # a row comes in whenever the watcher sleeps
        with log.open("a") as file:
            file.write("{}\n")

    monkeypatch.setattr(train_run.time, "sleep", sleep)
    monkeypatch.setattr(train_run.os, "kill", lambda pid, number: sent.append(number))
    train_run._stop_after(log, 3)
    assert sent == [train_run.signal.SIGTERM] and log.read_text().count("\n") == 3
