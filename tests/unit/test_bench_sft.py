"""bench/sft.py: its inputs, Mule's own way, and the table. TRL is not run and no time is tested."""

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
# Trained tokens a second in three rounds: the medians' ratio is not the median of the ratios.
RATES = {"mule": (300.0, 100.0, 200.0), "trl": (50.0, 20.0, 80.0), "trl-rows": (100.0, 100.0, 50.0)}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as it sees itself when it is run."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("sft")


def _found(name: str, number: int) -> dict[str, Any]:
    return {
        "targets_per_second": RATES[name][number],
        "tokens_per_second": 2 * RATES[name][number],
        "targets_per_update": 5_000.0,
        "rows_at_once": 4,
        "loss": 9.25,
        "first_update_s": 30.0 if number == 0 else 4.0,
        "peak_bytes": {"mule": 3, "trl": 5, "trl-rows": 8}[name] * 2**30,
        "versions": {"torch": "2.13.0"} | ({"trl": "1.2.3"} if name != "mule" else {}),
    }


@pytest.fixture
def results(bench: ModuleType, tmp_path: Path) -> Path:
    """Three rounds of three ways, as `run` writes them."""
    job = bench.sft_job("124m", tmp_path, "fp32", updates=4)
    rounds = [{name: _found(name, number) for name in RATES} for number in range(3)]
    file = tmp_path / "peers-sft.json"
    file.write_text(json.dumps(bench._described(job, rounds)))
    return file


@pytest.fixture
def shared(bench: ModuleType, tmp_path: Path) -> Path:
    """The files of the development data, with a few rows each."""
    folder = tmp_path / "data"
    for name in bench.CHATS:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            row = {"instruction": "Name a fish.", "input": "", "output": f"A cod of {file.stem}."}
            file.write_text(json.dumps([row] * 3))
        else:
            row = {"question": "What is 3 + 4?", "answer": "3 + 4 = 7\n#### 7"}
            file.write_text((json.dumps(row) + "\n") * 9)
    return folder


def test_both_sides_get_the_same_messages(bench: ModuleType, shared: Path, tmp_path: Path) -> None:
    from mule.tokenizer import Tokenizer

    bench.make_inputs(tmp_path, shared, 300)
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 3 + 9
    assert rows[-1]["messages"] == [
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "3 + 4 = 7\n#### 7"},
    ]
    assert Tokenizer.load(tmp_path / "tokenizer").vocab_size <= 300
    bench.make_inputs(tmp_path, shared, 300, most=5)
    assert len((tmp_path / "chat.jsonl").read_text().splitlines()) == 5


def test_the_job_is_the_124m_shape_in_rows_of_1024(bench: ModuleType, tmp_path: Path) -> None:
    job = bench.sft_job("124m", tmp_path, "bf16", updates=3)
    assert (job.hidden_size, job.num_layers, job.vocab_size) == (768, 12, 50_304)
    assert (job.row_length, job.rows, job.warm_up, job.timed) == (1024, 8, 2, 3)
    assert (job.precision, job.device) == ("bf16", "cpu")


def test_mule_is_measured_by_the_log_of_its_run(
    bench: ModuleType, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import train_run

    threads = torch.get_num_threads()
    bench.make_inputs(tmp_path, shared, 300)
    words = train_run.shape_words

    def eager(job: Any, steps: int) -> list[str]:
        return [word.replace("compile=true", "compile=false") for word in words(job, steps)]

    monkeypatch.setattr(train_run, "shape_words", eager)
    monkeypatch.setattr(bench, "begin", lambda job: 1000)
    job = bench.sft_job("tiny", tmp_path, "fp32", updates=2)
    found = bench.mule_figures(job)
    torch.set_num_threads(threads)
    assert len(found["updates_s"]) == job.timed == 2
    assert found["first_update_s"] > 0
    assert 0 < found["targets_per_update"] < 8 * job.row_length
    assert found["targets_per_second"] < found["tokens_per_second"]
    assert found["loss"] == pytest.approx(6.2, abs=0.3)  # ln 512
    assert set(found["versions"]) == {"torch", "mule"}


def test_trained_tokens_are_those_of_the_timed_updates(bench: ModuleType, tmp_path: Path) -> None:
    job = bench.sft_job("tiny", tmp_path, "fp32", updates=2)
    assert bench.targets_per_second(job, [9.0, 8.0, 1.0, 3.0], [7, 7, 10, 30]) == 10.0


def test_ratios_are_taken_within_a_round(bench: ModuleType, results: Path) -> None:
    row = bench._row(json.loads(results.read_text())["rounds"], "trl-rows")
    assert (row["rate"], row["lowest"], row["highest"]) == (100, 50, 100)
    assert row["ratio"] == 3.0  # of 3, 1 and 4; the medians' ratio is 2
    assert row["first_s"] == 30  # of the round that compiled


def test_the_table_compares_with_the_fastest_variant(bench: ModuleType, results: Path) -> None:
    text = bench.table(results)
    assert "| **Mule** | 200 (100-300) | 1.00x | 400 | 9.25 | 3.00 GiB | 30 s |" in text
    assert "| TRL, its defaults (gradient checkpointing) | 50 (20-80) | 5.00x |" in text
    assert (
        "**3.00 times** the tokens a second of TRL's fastest variant (TRL, activations kept, row"
        in (text)
    )
    assert "fp32, 8 rows of 1,024 tokens an update, of which Mule trains 5,000 in 4 rows" in text
    assert "Rounds: 3, 4 timed updates each after 2" in text
    assert "torch_compile" not in text  # it was not measured
    assert str(results.parent) not in results.read_text()


def test_the_page_shows_what_was_measured(bench: ModuleType, tmp_path: Path) -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    fresh = docs.with_generated(page, bench.table(), "sft")
    assert page == fresh, "run: python bench/sft.py report"
    assert bench.table(tmp_path / "nowhere.json").startswith("Nothing is measured yet")


def test_every_finished_round_is_kept(
    bench: ModuleType, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def one_round(job: Any, names: list[str], label: str) -> dict[str, Any]:
        asked.append(names)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {name: _found(name, 0) for name in names}

    for name, stub in (("_round", one_round), ("report", lambda: None), ("RESULTS", results)):
        monkeypatch.setattr(bench, name, stub)
    monkeypatch.setattr(bench, "make_inputs", lambda *given: None)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["run", "mule", "trl-rows", "rounds=5", "updates=1"])
    kept = json.loads(results.read_text())
    assert asked[0] == ["mule", "trl-rows"]
    assert (len(kept["rounds"]), kept["job"]["timed"]) == (2, 1)


def test_a_way_that_is_not_there_is_refused(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no way called `trl2`") as caught:
        bench.run(["trl2"])
    assert caught.value.hint.startswith("some of mule, trl, ")
    train = importlib.import_module("train")
    monkeypatch.setattr(train, "PEERS", tmp_path)
    job = bench.sft_job("tiny", tmp_path, "fp32", updates=1)
    with pytest.raises(UserError, match="bench/peers/trl is missing") as caught:
        bench.one_way(bench.WAYS["trl"], job, tmp_path)
    assert caught.value.hint == "make it: python bench/data.py setup"
