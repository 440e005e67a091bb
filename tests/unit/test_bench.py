"""`mule bench`: what it runs, writes and reports. No time is tested."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mule import machine
from mule.commands import bench, docs
from mule.errors import ConfigError, UserError

TINY = [
    *("model.size=1m", "model.vocab_size=64", "data.max_seq_length=8", "train.step_rows=6"),
    *("train.micro_batch_rows=3", "train.compile=false", "train.precision=fp32"),
    *("train.device=cpu", "train.threads=1"),
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Few updates and a made-up peak; the devices that the peak was asked for."""
    asked: list[str] = []

    def peak(dtype: str, device: str = "cpu", threads: int | None = None, *, fresh: bool) -> float:
        assert fresh
        asked.append(f"{dtype} {device} {threads}")
        return 1e12 * len(asked)

    monkeypatch.setattr(machine, "matmul_peak", peak)
    for name, value in {"_WARM_UP": 2, "_MAX_WARM_UP": 2, "_TIMED": 3, "_TIMED_S": 0.0}.items():
        monkeypatch.setattr(bench, name, value)
    before = torch.get_num_threads()
    yield asked
    torch.set_num_threads(before)


def test_a_result_has_every_figure_and_is_kept(quick: list[str], tmp_path: Path) -> None:
    result = bench.run("train", TINY, results=tmp_path)
    assert quick == ["fp32 cpu 1", "fp32 cpu 1"]  # before and after
    kept = json.loads(next(tmp_path.glob("train-model-size-1m-*.json")).read_text())
    assert kept == {name: result[name] for name in result if name not in ("file", "next")}
    assert kept["tokens_per_update"] == 48
    assert (kept["warm_up_updates"], kept["timed_updates"]) == (2, 3)
    assert kept["update_min_s"] <= kept["update_median_s"] <= kept["update_max_s"]
    rate = kept["tokens_per_second"] * kept["flops_per_token"]
    assert kept["flops_per_second"] == pytest.approx(rate)
    assert kept["share_of_peak"] == pytest.approx(rate / 2e12)  # of the larger peak
    assert kept["settings"] == {
        "step_rows": 6,
        "micro_batch_rows": 3,
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "threads": 1,
    }
    assert kept["model"]["vocab_size"] == 64
    assert kept["command"].startswith("mule bench train model.size=1m model.vocab_size=64 ")
    assert {"date", "mule", "torch", "machine", "peak_memory_bytes"} <= kept.keys()


def test_report_and_page_show_what_was_kept(quick: list[str], tmp_path: Path) -> None:
    assert bench.run("report", [], results=tmp_path) == {"benches": [], "next": "mule bench train"}
    assert "Nothing is recorded yet" in docs.performance_markdown(tmp_path)
    result = bench.run("train", TINY, results=tmp_path)
    (tmp_path / "first-life.json").write_text("{}")  # another script's: passed over
    (row,) = bench.run("report", [], results=tmp_path)["benches"]
    assert row["tokens_per_second"] == result["tokens_per_second"]
    assert row["peak_gflops"] == 2000
    page = docs.performance_markdown(tmp_path)
    assert f"| {result['tokens_per_second']:,.0f} |" in page
    assert f"| **{result['share_of_peak']:.1%}** |" in page
    assert "fp32, not compiled" in page


def test_the_standard_benchmark_is_the_25m_size_as_a_run_would_train_it() -> None:
    recipe = bench._recipe([])
    assert (recipe.model.size, recipe.model.vocab_size) == ("25m", 32768)
    assert recipe.data.max_seq_length == 1024
    assert recipe.train.compile is True
    assert recipe.train.micro_batch_rows == "auto"
    resolved = bench._resolved(bench._recipe(["train.compile=false"]))
    assert resolved.step_rows == 8


def test_all_runs_every_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[str] = []

    def one(name: str, words: list[str], results: Path) -> dict[str, str]:
        called.append(name)
        return {}

    monkeypatch.setattr(bench, "_one", one)
    assert bench.run("all", [], results=tmp_path)["next"] == "make docs"
    assert called == ["train", "compile"], "merge needs an adapter's name"


def test_warming_up_goes_on_until_it_is_steady() -> None:
    times = iter([9.0, 3.0, 1.0, 1.2, 1.0, 1.01, 1.02, 5.0])
    assert bench._warm_up(lambda: next(times)) == [9.0, 3.0, 1.0, 1.2, 1.0, 1.01, 1.02]


def test_an_unknown_benchmark_and_an_unknown_key() -> None:
    with pytest.raises(UserError, match="no benchmark called `trian`") as caught:
        bench.run("trian", [])
    assert caught.value.hint == "did you mean `train`?"
    with pytest.raises(UserError) as caught:
        bench.run("lunch", [])
    assert caught.value.hint == "one of train, compile, merge, kv, all, report"
    with pytest.raises(ConfigError, match="modle"):
        bench.run("train", ["modle.size=1m"])


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpp_compiler_problem", lambda: "no C++ compiler is installed")
    with pytest.raises(UserError, match="cannot be measured: no C\\+\\+ compiler") as caught:
        bench._resolved(bench._recipe(["train.device=cpu"]))
    assert "train.compile=false" in caught.value.hint
