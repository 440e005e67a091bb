"""bench/serve.py: its inputs, Mule's own ways, and the table. No peer is run, no time is tested."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mule.commands import docs
from mule.errors import UserError

BENCH = Path(__file__).resolve().parents[2] / "bench"
# Tokens a second at batch 1 in three rounds: the medians' ratio is not the median of the ratios.
RATES = {
    "mule-bf16": (60.0, 20.0, 40.0),
    "mule-fp32": (20.0,) * 3,
    "hf-bf16": (20.0, 20.0, 10.0),
    "hf-fp32": (10.0,) * 3,
    "llamacpp": (50.0,) * 3,
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as it sees itself when it is run."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("serve")


def _found(name: str, number: int) -> dict[str, Any]:
    rate = RATES[name][number]
    last = 3 if name == "hf-fp32" else 4
    return {
        "prefill": 10 * rate,
        "decode": {"1": rate, "4": 2 * rate, "16": 5 * rate},
        "mixed": 4 * rate,
        "ids": {"1": [[1, 2, 3]], "4": [[1, 2, last], [5, 6, 7]]},
        "versions": {name.partition("-")[0]: "1.2.3"},
    }


def _rounds() -> list[dict[str, Any]]:
    return [
        {"bandwidths": [12.6e9, 10e9]} | {name: _found(name, number) for name in RATES}
        for number in range(3)
    ]


def test_the_job_is_the_shape_that_the_page_names(bench: ModuleType, tmp_path: Path) -> None:
    from mule.models import cost

    job = bench.llama_job(tmp_path)
    assert cost.total_params(bench.config_of(job)) == 125_854_464
    assert [rows for rows, _ in job.batches] == [1, 4, 16]
    longest = max(job.prefill_tokens + 1, sum((job.mixed_prompt[1], job.mixed_answer[1])))
    assert longest < job.row_length
    assert json.loads(json.dumps(job.__dict__))["batches"] == [[1, 40], [4, 32], [16, 24]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny job and its inputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        bench = importlib.import_module("serve")
        made = bench.tiny_job(tmp_path_factory.mktemp("serve"))
        bench.make_inputs(made)
    return made


def test_mules_engines_give_the_greedy_answers_of_the_model(job: Any, bench: ModuleType) -> None:
    import torch

    from mule.generate.engine import stream
    from mule.models.folder import load_model

    threads = torch.get_num_threads()
    ours = bench.mule_figures(replace(job, way="mule-fp32"))
    theirs = bench.mule_figures(replace(job, way="llamacpp"))
    torch.set_num_threads(threads)
    for found in (ours, theirs):
        assert found["prefill"] > 0 and found["mixed"] > 0
        assert {count: [len(row) for row in rows] for count, rows in found["ids"].items()} == {
            "1": [12],
            "3": [12] * 3,
        }
    assert ours["ids"]["1"] == theirs["ids"]["1"], "the file holds other weights than the folder"
    prompts: list[list[int]] = []

    def answered(given: list[list[int]], lengths: list[int]) -> Any:
        prompts.append(given[0])
        times = [[float(place + 1) for place in range(length)] for length in lengths]
        return bench.Answers(0.0, [[0] * length for length in lengths], times)

    bench.figures(job, answered)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts), "a prompt came twice"
    first = prompts[1 + job.prefills + 1]  # after the prefills and a warm-up
    model = load_model(job.folder).eval()
    assert list(stream(model, first, max_tokens=12, stop_ids=())) == ours["ids"]["1"][0]


def test_an_answer_that_fails_ends_the_measurement(job: Any, bench: ModuleType) -> None:
    engine = bench.torch_engine(job, "bf16")
    try:
        generate = bench.generate_with(engine)
        with pytest.raises(UserError, match="an answer ended with context"):
            generate([[20] * 250], [99])
        assert [len(row) for row in generate([[20], [21, 22]], [2, 5]).ids] == [2, 5]
    finally:
        engine.close()


def test_decoding_is_timed_while_all_rows_are_answered(bench: ModuleType) -> None:
    from serve_job import decode_rate

    assert decode_rate([[1.0, 2.0, 3.0]]) == 1.0
    # Between 2.0 (the second row's first) and 4.0 (the first row's last): 2, then 3 tokens.
    assert decode_rate([[1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.5, 4.0, 9.0]]) == 2.5
    assert decode_rate([[1.0, 2.0], [3.0, 4.0]]) == 1.0  # never together


# ---------------------------------------------------------------- the table


@pytest.fixture
def results(bench: ModuleType, tmp_path: Path) -> Path:
    file = tmp_path / "serve.json"
    file.write_text(json.dumps(bench._described(bench.llama_job(tmp_path), _rounds())))
    assert str(tmp_path) not in file.read_text(), "a path of this machine is kept"
    return file


def test_the_table(bench: ModuleType, results: Path) -> None:
    text = bench.table(results)
    # 12.6 GB/s over 2 bytes of 126 M parameters: 50 tokens a second at most.
    assert "| **Mule**, bf16 | 40.0 | 80.0 | 200.0 | 80% | 400 | 160 |" in text
    assert "| transformers, fp32 | 10.0 | 20.0 | 50.0 | 40% | 100 | 40 |" in text
    wanted = "decoding one answer: **Mule**, bf16 makes **3.00 times** the tokens a second of "
    assert wanted + "transformers, bf16; wanted: 1.6 (met)" in text
    assert "**0.80 times** the tokens a second of llama.cpp, f16; wanted: 0.9 (**missed**)" in text
    assert "mixed lengths: **Mule**, bf16 makes **3.00 times** the" in text
    assert "prefill: **Mule**, bf16 makes **0.80 times** the" in text
    assert "in fp32: 6 of 9 are token for token those of transformers (of 3 different" in text
    assert "125.9 M parameters; memory is read at 12.6 GB/s." in text


def test_what_was_not_measured_is_left_out(bench: ModuleType, results: Path) -> None:
    found = json.loads(results.read_text())
    for one in found["rounds"]:
        del one["hf-fp32"], one["hf-bf16"]
    text = bench.table_text(found)
    assert "transformers" not in text.replace("Greedy answers in fp32 were not compared", "")
    assert "Greedy answers in fp32 were not compared." in text


def test_the_page_shows_what_was_measured(bench: ModuleType) -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    fresh = docs.with_generated(page, bench.table(), "serve")
    assert page == fresh, "run: python bench/serve.py report"
    assert bench.table(Path("nowhere.json")).startswith("Not measured yet: ")


def test_words_that_name_nothing_are_refused(bench: ModuleType) -> None:
    with pytest.raises(UserError, match="there is no way called `mlx`") as caught:
        bench.run(["mlx"])
    assert caught.value.hint.startswith("some of mule-bf16, mule-fp32, hf-bf16, ")


def test_every_finished_round_is_kept(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def one_round(job: Any, names: list[str], label: str) -> dict[str, Any]:
        asked.append((names, label))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return _rounds()[0]

    monkeypatch.setattr(bench, "RESULTS", tmp_path / "serve.json")
    monkeypatch.setattr(bench, "_round", one_round)
    monkeypatch.setattr(bench, "make_inputs", lambda job: None)
    monkeypatch.setattr(bench, "report", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["run", "llamacpp", "mule-bf16", "rounds=3"])
    assert asked[1] == (["mule-bf16", "llamacpp"], "2/3")
    assert len(json.loads((tmp_path / "serve.json").read_text())["rounds"]) == 2
