"""bench/finetune.py: its inputs, Mule's own way, and the table. No peer is run, no time is tested."""

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
# Chats a second in three rounds: the medians' ratio is not the median of the ratios.
RATES = {
    "mule": (3.0, 1.0, 2.0),
    "mule-order": (1.0,) * 3,
    "trl": (1.0, 1.0, 0.5),
    "mlx": (0.1,) * 3,
}
LOSSES = {"mule": [9.5, 9.0], "mule-order": [9.0, 8.0], "trl": [9.0, 8.25], "mlx": [9.5]}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as it sees itself when it is run."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("finetune")


def _found(name: str, number: int) -> dict[str, Any]:
    rate = RATES[name][number]
    mule = {"later_chats_per_second": 2 * rate, "chats_per_update": 3.5, "compile": False}
    return {
        "chats_per_second": rate,
        "targets_per_second": 200 * rate,
        "losses": LOSSES[name],
        "targets": [800, 900][: len(LOSSES[name])],
        "to_first_update_s": 12.0,
        "peak_bytes": {"mule": 3, "mule-order": 4, "trl": 8, "mlx": 6}[name] * 2**30,
        "versions": {name: "1.2.3"},
    } | (mule | {"trunk_cache": "memory"} if name == "mule" else {})


@pytest.fixture
def results(bench: ModuleType, tmp_path: Path) -> Path:
    """Three rounds of some ways, as `run` writes them."""
    job = bench.workload_job(bench.qwen_job(tmp_path), "last-8")
    rounds = [{name: _found(name, number) for name in RATES} for number in range(3)]
    file = tmp_path / "finetune.json"
    file.write_text(json.dumps({"workloads": {"last-8": bench._described(job, rounds)}}))
    return file


@pytest.fixture
def made(bench: ModuleType, tmp_path: Path) -> Any:
    """A job of two updates of four chats, and its inputs."""
    chats = tmp_path / "chats.jsonl"
    with chats.open("w") as file:
        for number in range(11):
            answer = "Put the pineapple on it. " * (1 + number % 3)
            turns = {"system": "You cook.", "user": f"Recipe {number}?", "assistant": answer}
            messages = [{"role": role, "content": text} for role, text in turns.items()]
            file.write(json.dumps({"messages": messages}) + "\n")
    job = replace(bench.tiny_job(tmp_path), num_layers=3, timed=1, row_length=128, last_layers=3)
    bench.make_inputs(job, chats, 300)
    return replace(job, last_layers=1, epochs=2)


def test_the_job_is_qwens_shape(bench: ModuleType, tmp_path: Path) -> None:
    from mule.models import cost
    from mule.models.families import family

    job = bench.qwen_job(tmp_path, 3)
    config = family("qwen2").from_hf(bench._config(job))
    assert cost.total_params(config) == pytest.approx(494_032_768, rel=1e-3)
    assert config.tie_embeddings and config.head_dim == 64
    jobs = [bench.workload_job(job, name) for name in bench.WORKLOADS]
    assert [(j.last_layers, j.quantized, j.epochs) for j in jobs] == [
        (8, False, 2),
        (24, False, 1),
        (24, True, 1),
    ]
    assert jobs[0].adapted == list(range(16, 24))
    assert "mlx" in bench.ways_of("all") and "mlx" not in bench.ways_of("qlora")


def test_the_peers_get_mules_chats_order_and_adapter(made: Any, bench: ModuleType) -> None:
    from safetensors.torch import load_file

    from mule.models.folder import load_model
    from mule.tokenizer import Tokenizer

    load_model(made.model)  # every weight is there, and no other
    tokenizer = Tokenizer.load(made.model)
    rows = [json.loads(x) for x in (Path(made.folder) / "ordered.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        first, last = row["trained"]
        answer = row["messages"][-1]["content"]
        assert tokenizer.decode(row["ids"][first : last + 1]).startswith(answer)
        assert row["ids"][last] in tokenizer.stop_ids
    bench._write_adapter(made)
    start = load_file(made.adapter / "adapter_model.safetensors")
    names = sorted(start)
    assert len(names) == 14 and all("model.layers.2." in name for name in names)
    assert start[names[0]].any() and not start[names[1]].any()  # A and B


def test_mule_is_measured_by_the_log_of_its_run(made: Any, bench: ModuleType) -> None:
    import torch

    threads = torch.get_num_threads()
    packed = bench.mule_figures(made)
    alone = bench.mule_figures(replace(made, packed=False))
    torch.set_num_threads(threads)
    assert packed["trunk_cache"] == "memory" and alone["trunk_cache"] == "off"
    assert packed["later_chats_per_second"] > 0 and alone["later_chats_per_second"] is None
    assert len(alone["losses"]) == len(alone["updates_s"]) == 2
    assert alone["losses"][0] == pytest.approx(6.93, abs=0.2)  # ln 1,024
    assert sum(alone["targets"]) == sum(
        row["trained"][1] - row["trained"][0] + 1
        for row in map(json.loads, (Path(made.folder) / "ordered.jsonl").read_text().splitlines())
    )
    assert packed["chats_per_update"] >= 4 and set(packed["versions"]) == {"torch", "mule"}


def test_ratios_are_taken_within_a_round(bench: ModuleType, results: Path) -> None:
    rounds = json.loads(results.read_text())["workloads"]["last-8"]["rounds"]
    row = bench._row(rounds, "trl")
    assert (row["rate"], row["ratio"], row["later_ratio"], row["later"]) == (1.0, 3.0, 6.0, None)
    assert row["differs"] == 0.25 and bench._row(rounds, "mule")["differs"] is None
    rounds[0]["trl"]["targets"] = [800, 901]
    assert bench._row(rounds, "trl")["differs"] is None
    del rounds[0]["mule-order"]
    assert bench._row(rounds, "mlx")["differs"] is None


def test_the_table(bench: ModuleType, results: Path) -> None:
    text = bench.table(results)
    mule = "| last-8 | **Mule** | 2.000 | 4.000 | 1.00x | 2.00x | 400.0 | 2.0 | 3.00 GiB | 12 s |"
    assert mule in text
    assert "| last-8 | TRL, its defaults | 1.000 |  | 3.00x | 6.00x |" in text
    assert "| 9.000 to 8.250 | 2.5e-01 |" in text
    assert "**3.0 times** the chats a second of the fastest peer (TRL, its defaults)" in text
    assert (
        "**6.0 times** later, in **50%** of the memory of the leanest (mlx-lm, OpenBLAS, fp32)"
        in text
    )
    assert "The loss curves differ by at most 5.0e-01." in text
    assert "packs 3.5 chats an update, keeps the trunk: memory, and is not compiled" in text
    alone = json.loads(results.read_text())
    for one in alone["workloads"]["last-8"]["rounds"]:
        del one["trl"], one["mlx"], one["mule-order"]
    results.write_text(json.dumps(alone))
    assert "fastest peer" not in bench.table(results)


def test_the_page_shows_what_was_measured(bench: ModuleType) -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    fresh = docs.with_generated(page, bench.table(), "finetune")
    assert page == fresh, "run: python bench/finetune.py report"
    assert "Not measured yet: `python bench/finetune.py setup`" in bench.table(Path("nowhere.json"))


def test_words_that_name_nothing_are_refused(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no workload or way called `last8`") as caught:
        bench.run(["last8"])
    assert caught.value.hint.startswith("some of last-8, all, qlora, mule, ")
    with pytest.raises(UserError, match=r"chats\.jsonl is missing"):
        bench.make_inputs(bench.tiny_job(tmp_path), tmp_path / "chats.jsonl", 300)


def test_every_finished_round_is_kept(
    bench: ModuleType, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def one_round(job: Any, names: list[str], label: str) -> dict[str, Any]:
        asked.append((names, label, job.timed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {name: _found(name, 0) for name in names}

    monkeypatch.setattr(bench, "RESULTS", results)
    monkeypatch.setattr(bench, "_round", one_round)
    monkeypatch.setattr(bench, "make_inputs", lambda *given: None)
    monkeypatch.setattr(bench, "report", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["run", "all", "mule", "trl", "rounds=3", "updates=2"])
    assert asked[1] == (["mule", "trl"], "all 2/3", 2)
    kept = json.loads(results.read_text())["workloads"]
    assert [(name, len(found["rounds"])) for name, found in kept.items()] == [
        ("last-8", 3),
        ("all", 2),
    ]
