"""`mule bench compile`: what it makes of its figures, and one whole measurement. No time is tested."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mule import machine
from mule.batch import IGNORE
from mule.commands import bench, bench_compile
from mule.errors import CheckFailed, UserError
from tests.conftest import Mule

TINY = [
    *("model.size=1m", "model.vocab_size=64", "data.max_seq_length=16", "train.step_rows=4"),
    *("train.micro_batch_rows=2", "train.precision=fp32", "train.device=cpu", "train.threads=1"),
]


def _way(update_s: float, start_s: float, *faults: str, graphs: int = 3) -> dict[str, Any]:
    return {
        "first_update_s": start_s + update_s,
        "update_s": update_s,
        "start_s": start_s,
        "timed_updates": 8,
        "graphs": graphs,
        "graph_breaks": 0,
        "recompiles": len(faults),
        "kept_hits": 0,
        "faults": list(faults),
    }


def _found(compiled_s: float = 0.75, *faults: str) -> dict[str, Any]:
    """An update takes 1 s; compiling takes 30 s, and 5 s when its results were kept."""
    return {
        "eager": _way(1.0, 1.0, graphs=0),
        "compiled": _way(compiled_s, 31.0),
        "compiled, kept": _way(compiled_s, 6.0),
        "eager chats": _way(2.0, 1.0, graphs=0),
        "compiled chats": _way(1.0, 33.0, *faults),
    }


def test_it_pays_off_when_the_saved_seconds_are_what_compiling_took() -> None:
    made = bench_compile.judge(_found())
    assert made["share_saved"] == 0.25 and made["share_saved_chats"] == 0.5
    assert made["pays"] == {"after_updates": 120, "kept_after_updates": 20}  # 30 / 0.25, 5 / 0.25
    assert made["verdict"] == (
        "pays off after 120 updates (2.0 minutes); from the second start on after 20; "
        "a run shorter than this is faster with train.compile=false"
    )
    assert made["faults"] == []
    assert "faults" not in made["ways"]["compiled"]
    assert made["ways"]["compiled"]["graphs"] == 3


def test_it_never_pays_off_where_a_compiled_update_is_no_faster() -> None:
    made = bench_compile.judge(_found(1.25))
    assert made["pays"] == {"after_updates": None, "kept_after_updates": None}
    assert made["verdict"].startswith("does not pay off: a compiled update takes no less time")
    assert made["verdict"].endswith("train.compile=false")


def _compare(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure nothing: the processes give these figures; the jobs they were given."""
    jobs: list[dict[str, Any]] = []

    def in_a_process(job: dict[str, Any], cache: Path) -> dict[str, Any]:
        jobs.append({**job, "cache": cache.name})
        return list(found.values())[len(jobs) - 1]

    monkeypatch.setattr(bench_compile, "_in_a_process", in_a_process)
    monkeypatch.setattr(machine, "cpp_compiler_problem", lambda: None)
    return jobs


def test_every_way_measures_the_same_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = _compare(monkeypatch, _found())
    words = [word for word in TINY if "rows" not in word]
    bench.run("compile", [*words, "train.step_tokens=64"], results=tmp_path)
    assert [(job["kind"], job["cache"]) for job in jobs] == [
        ("rows", "none"),
        ("rows", "rows"),
        ("rows", "rows"),
        ("chats", "none"),
        ("chats", "chats"),
    ]
    recipes = [bench._recipe(job["words"]) for job in jobs]
    assert [recipe.train.compile for recipe in recipes] == [False, True, True, False, True]
    assert len({recipe.model.model_dump_json() for recipe in recipes}) == 1
    for recipe in recipes:
        assert recipe.train.step_rows == 4 and recipe.train.step_tokens is None
        assert recipe.train.micro_batch_rows == 4  # decided once, not by each process


def test_the_result_is_kept_and_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mule_cli: Mule
) -> None:
    _compare(monkeypatch, _found())
    code, out, _ = mule_cli("bench", "compile", *TINY)
    assert code == 0
    assert "pays off after 120 updates (2.0 minutes)" in out and "25.0%" in out
    (file,) = (tmp_path / "bench" / "results").glob("compile-*.json")
    kept = json.loads(file.read_text())
    assert kept["tokens_per_update"] == 64
    assert kept["settings"]["step_rows"] == 4 and "compile" not in kept["settings"]
    assert str(tmp_path) not in file.read_text()
    _, out, _ = mule_cli("bench", "report", "--json")
    (row,) = json.loads(out.splitlines()[-1])["compiling"]
    assert (row["eager_update_s"], row["compiled_update_s"], row["pays_after_updates"]) == (
        1.0,
        0.75,
        120,
    )
    assert (row["first_update_s"], row["kept_first_update_s"], row["faults"]) == (31.75, 6.75, 0)


def test_what_is_compiled_again_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    again = "softmax_nll (loss.py:28) compiled again: size mismatch"
    _compare(monkeypatch, _found(0.75, again))
    with pytest.raises(CheckFailed, match="what is compiled has faults") as caught:
        bench.run("compile", TINY, results=tmp_path)
    assert f"compiled chats: {again}" in caught.value.message
    assert "TORCH_LOGS=graph_breaks,recompiles mule bench compile model.size" in caught.value.hint
    assert len(list(tmp_path.glob("compile-*.json"))) == 1  # what was measured is not lost


def test_compile_is_not_a_word_of_it() -> None:
    with pytest.raises(UserError, match=r"train\.compile cannot be given") as caught:
        bench_compile.compare(["train.compile=false"])
    assert "mule bench train train.compile=false" in caught.value.hint


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = SimpleNamespace(returncode=-9, stdout="", stderr="lines before\nKilled\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ran)
    with pytest.raises(UserError, match="ended with -9: Killed") as caught:
        bench_compile._in_a_process({}, tmp_path)
    assert "model.size=10m" in caught.value.hint


def test_made_up_chats_are_packed_as_prepared_ones_are() -> None:
    torch.manual_seed(0)
    resolved = bench._resolved(bench._recipe([*TINY, "train.compile=false"]))
    shares = set()
    for _ in range(4):
        batches = bench._batches(resolved, 64, "chats")
        assert [tuple(batch.targets.shape) for batch in batches] == [(2, 16), (2, 16)]
        for batch in batches:
            assert batch.isolated
            begins = batch.positions == 0
            assert torch.equal(batch.segments, begins.cumsum(1))  # an example begins at position 0
            same = batch.segments[:, 1:] == batch.segments[:, :-1]
            assert torch.equal(same, batch.positions[:, 1:] == batch.positions[:, :-1] + 1)
            trained = batch.targets != IGNORE
            shares.add(int(trained.sum()))
            follows = batch.targets[:, :-1] == batch.input_ids[:, 1:]
            assert bool((follows | ~trained[:, :-1]).all())
    assert len(shares) > 3  # no two updates alike
    assert not bench._batches(resolved, 64)[0].isolated


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_nothing_is_compiled_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_compile, "_TIMED_S", 0.0)
    # Rows long enough for attention to go by document, which has a kernel of its own.
    words = [word.replace("max_seq_length=16", "max_seq_length=544") for word in TINY]
    result = bench.run("compile", words, results=tmp_path)  # CheckFailed for what it finds
    ways = result["ways"]
    assert ways["eager"]["graphs"] == ways["eager chats"]["graphs"] == 0
    for name in ("compiled", "compiled, kept", "compiled chats"):
        assert ways[name]["graphs"] >= 3  # a block, the loss, the optimizer
        assert ways[name]["graph_breaks"] == ways[name]["recompiles"] == 0
        assert ways[name]["timed_updates"] == 8
    assert ways["compiled"]["kept_hits"] == 0
    assert ways["compiled, kept"]["kept_hits"] >= ways["compiled, kept"]["graphs"]
