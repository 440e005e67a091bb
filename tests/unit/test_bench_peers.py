"""bench/train.py: the job, Mule's own way, and the table. No peer is run and no time is tested."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import train as bench
from mule.commands import docs
from mule.errors import UserError
from mule.models import cost

PEAKS = ([0.5e12, 1e12], [0.8e12, 0.9e12], [0.7e12, 0.6e12])
# Tokens a second in three rounds: the ratios of the medians are not the medians of the ratios.
RATES = {"mule": (300.0, 100.0, 200.0), "plain": (100.0, 100.0, 50.0), "litgpt": (50.0, 20.0, 80.0)}
GIB = 2**30
SHAPES = {"25m": 25_694_720, "124m": 123_587_328}  # and their parameters
WORDS = bench._words


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(bench.ROOT / "bench"))  # as for a script that is run


def _found(name: str, number: int) -> dict[str, Any]:
    memory = {"mule": 3, "plain": 5, "litgpt": 8}[name]
    return {
        "tokens_per_second": RATES[name][number],
        "first_update_s": 30.0 if number == 0 else 4.0,
        "peak_bytes": memory * GIB,
        "state_bytes": 2 * GIB,
        "versions": {"torch": "2.13.0"} | ({name: "1.2.3"} if name != "plain" else {}),
    }


@pytest.fixture
def results(tmp_path: Path, jobs: None) -> Path:
    """Three rounds of Mule and two peers, as `run` writes them."""
    rounds = [
        {"peaks": PEAKS[number]} | {name: _found(name, number) for name in RATES}
        for number in range(3)
    ]
    file = tmp_path / "peers-train.json"
    shapes = {"25m": bench._described(bench.job_of("25m"), rounds)}
    file.write_text(json.dumps({"bench": "peers-train", "shapes": shapes}))
    return file


def test_the_jobs_are_the_shapes_of_the_table(jobs: None) -> None:
    counts = {name: cost.total_params(bench.config_of(bench.job_of(name))) for name in SHAPES}
    assert counts == SHAPES
    assert [bench.job_of(name).rows for name in SHAPES] == [8, 4]
    assert [bench.job_of(name).timed for name in SHAPES] == [10, 5]


def _eager(job: Any) -> list[str]:
    return [word.replace("compile=true", "compile=false") for word in WORDS(job)]


def test_mule_is_given_the_job_whole(jobs: None) -> None:
    from mule.commands.bench import _resolved
    from mule.config.load import load_recipe
    from mule.plan.shape import new_model_config

    for name in SHAPES:
        job = bench.job_of(name)
        recipe = load_recipe(None, _eager(job), complete=False)
        assert new_model_config(recipe.recipe, 1) == bench.config_of(job)
        resolved = _resolved(recipe.recipe)
        assert resolved.step_rows == resolved.recipe.train.micro_batch_rows == job.rows


def test_mule_reports_what_the_peers_report(jobs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import train_timing

    threads = torch.get_num_threads()
    monkeypatch.setattr(train_timing, "begin", lambda job: 1000)
    monkeypatch.setattr(bench, "_words", _eager)
    job = bench.job_of("tiny")
    found = bench.mule_figures(job)
    torch.set_num_threads(threads)
    assert found["loss"] == pytest.approx(math.log(job.vocab_size), rel=0.05)
    assert len(found["updates_s"]) == job.timed
    assert found["state_bytes"] == pytest.approx(
        12 * cost.total_params(bench.config_of(job)), rel=0.01
    )
    assert set(found["versions"]) == {"torch", "mule"}


def test_a_row_is_the_median_and_ratios_are_taken_within_a_round(results: Path) -> None:
    found = json.loads(results.read_text())["shapes"]["25m"]
    row = bench._row(found, "plain")
    assert (row["rate"], row["lowest"], row["highest"]) == (100, 50, 100)
    assert row["ratio"] == 3.0  # of 3, 1 and 4; the medians' ratio is 2
    assert row["flops"] == 100 * found["flops_per_token"]
    assert row["share"] == pytest.approx(row["flops"] / 1e12)  # of the highest peak
    assert row["first_s"] == 30  # of the round that compiled


def test_the_table_names_the_fastest_and_the_leanest(results: Path) -> None:
    text = bench.table(results)
    assert "| 25m | **Mule** | 200 (100-300) | 1.00x |" in text
    assert "| 25m | LitGPT, compiled | 50 (20-80) | 5.00x |" in text
    assert "| 3.00 GiB | 2.00 GiB | 30 s |" in text
    assert "**3.00 times** the tokens a second of the fastest peer (plain PyTorch loop" in text
    assert "**60%** of the memory of the leanest (plain PyTorch" in text
    assert "without the state in 33%" in text
    assert "Rounds: 3, 10 timed updates each after 3. Peak: 1,000 GFLOP/s" in text
    assert "litgpt 1.2.3, mule 1.2.3, torch 2.13.0" in text
    assert "HF Trainer" not in text  # it was not measured


def test_the_report_is_written_between_its_marks(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, end = (mark.format("peers") for mark in docs._MARKS)
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    monkeypatch.setattr(bench, "PAGE", page)
    monkeypatch.setattr(bench, "table", lambda: "| new |\n")
    bench.report()
    assert page.read_text() == f"before\n{begin}\n\n| new |\n\n{end}\nafter\n"


def test_the_page_shows_what_was_measured() -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    fresh = docs.with_generated(page, bench.table(), "peers")
    assert page == fresh, "run: python bench/train.py report"
    assert "Nothing is measured yet" in bench.table(Path("nowhere.json"))


def test_every_finished_round_is_kept_and_other_shapes_stay(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []

    def one_round(job: Any, cache: Path, label: str) -> dict[str, Any]:
        if len(reports) == 2:
            raise KeyboardInterrupt
        return {"peaks": PEAKS[0]} | {name: _found(name, 0) for name in RATES}

    monkeypatch.setattr(bench, "RESULTS", results)
    monkeypatch.setattr(bench, "_round", one_round)
    monkeypatch.setattr(bench, "report", lambda: reports.append(results.read_text()))
    with pytest.raises(KeyboardInterrupt):
        bench.run(["124m"])
    kept = json.loads(results.read_text())["shapes"]
    assert [(name, len(shape["rounds"])) for name, shape in kept.items()] == [
        ("25m", 3),
        (f"124m, {bench.PRECISION}", 2),
    ]
    assert kept[f"124m, {bench.PRECISION}"]["params"] == SHAPES["124m"]


def test_the_words_of_run(monkeypatch: pytest.MonkeyPatch, jobs: None) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(bench, "run", lambda *given, **more: asked.append((given, more)))
    bench.main(["run", "124m", "rounds=2", "updates=3"])
    bench.main(["run"])
    assert asked == [((["124m"],), {"rounds": 2, "updates": 3}), (([],), {})]
    monkeypatch.undo()
    with pytest.raises(UserError, match="no shape called `12m`") as caught:
        bench.run(["12m"])
    assert caught.value.hint == "one of 25m, 124m"


def test_the_results_are_not_taken_for_those_of_mule_bench() -> None:
    assert not bench.RESULTS.match("train*.json")  # what `mule bench report` and its page read


def test_a_way_runs_in_its_environment_with_its_job(
    jobs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def ran(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout='a warning\n{"loss": 1.5}\n')

    monkeypatch.setattr(bench, "PEERS", tmp_path)
    monkeypatch.setattr(bench.subprocess, "run", ran)
    job = bench.job_of("tiny")
    assert bench.one_way(bench.WAYS["mule"], job, tmp_path) == {"loss": 1.5}
    assert commands[0][1].endswith("bench/train.py") and commands[0][2] == "one"
    with pytest.raises(UserError, match="bench/peers/litgpt is missing") as caught:
        bench.one_way(bench.WAYS["litgpt"], job, tmp_path)
    assert caught.value.hint == "make it: python bench/train.py setup"
    (tmp_path / "litgpt" / "bin").mkdir(parents=True)
    python = tmp_path / "litgpt" / "bin" / "python"
    python.touch()
    bench.one_way(bench.WAYS["litgpt"], job, tmp_path)
    assert commands[1][0] == str(python) and commands[1][1].endswith("bench/train_litgpt.py")
    assert json.loads(commands[1][2])["vocab_size"] == 512 and commands[1][3] == "fused"


def test_memory_is_counted_from_after_the_imports(jobs: None) -> None:
    from train_timing import figures, memory_bytes

    job = bench.job_of("tiny")
    found = figures(job, [9.0, 2.0, 2.0], [6.0, 4.0], baseline=1000, state=7)
    assert found["tokens_per_second"] == 2 * 128 / 4.0  # the first update is not timed
    assert (found["first_update_s"], found["updates_s"], found["loss"]) == (9.0, [2.0, 2.0], 5.0)
    assert found["peak_bytes"] == memory_bytes("VmHWM") - 1000 > 0
    assert found["state_bytes"] == 7
