"""`mule bench kv`: what it measures, how it reads its words, and what it says. No time is tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mule import machine
from mule.commands import bench, bench_kv
from mule.errors import UserError
from mule.models import cost
from tests.conftest import Mule
from tests.merge_case import MergeCase, make_case

SCRIPTS = Path(__file__).resolve().parents[2] / "bench"
WORDS = ["1m", "context=16,32", "repetitions=1", "new_tokens=4", "vocab_size=128"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> MergeCase:
    return make_case(tmp_path_factory.mktemp("kv"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kinds_of_attention_are_measured_and_written(precision: str, tmp_path: Path) -> None:
    words = bench.with_options(
        "kv", [*WORDS, f"precision={precision}"], {"attention": "mha,mqa", "batch": "1,2"}
    )
    result = bench.run("kv", words, results=tmp_path)
    places = [(row["attention"], row["context"], row["batch"]) for row in result["rows"]]
    assert places == [(a, c, b) for a in ("mha", "mqa") for c in (16, 32) for b in (1, 2)]
    assert result["same_text"] is True and result["cache_bytes_as_the_formula"] is True
    assert result["max_error"] < 0.05 and result["not_measured"] == []
    sizes = {row["attention"]: row["cache_bytes"] for row in result["rows"]}
    assert sizes["mha"] == 2 * sizes["mqa"], "as the heads of keys and values"
    assert {name: card["num_kv_heads"] for name, card in result["models"].items()} == {
        "mha": 2,
        "mqa": 1,
    }
    for row in result["rows"]:
        assert row["gain"] > 0 and row["predicted_gain"] > 0
        assert row["share_of_prediction"] == pytest.approx(row["gain"] / row["predicted_gain"])
    assert "at 32 tokens the cache makes decoding" in result["verdict"]
    (shown,) = bench.run("report", [], results=tmp_path)["caches"]
    assert (shown["model"], shown["context"], shown["batch"]) == ("1m", 32, 1)


def test_a_model_is_measured_as_it_is(case: MergeCase) -> None:
    result = bench_kv.compare([str(case.base), "context=24", "repetitions=1", "new_tokens=4"])
    (row,) = result["rows"]
    assert row["attention"] == "own" and row["same_text"] is True
    precisions = {"fp32", "bf16"}
    assert result["precision"] in precisions


def test_shapes_differ_in_key_value_heads_alone() -> None:
    asked = bench_kv.read_words(["125m", "context=64"])
    assert asked.attention == ("gqa",) and asked.batch == (1,)
    shapes = {kind: bench_kv.shaped_config(asked, kind) for kind in ("mha", "gqa", "gqa-2", "mqa")}
    assert [shape.num_kv_heads for shape in shapes.values()] == [12, 4, 2, 1]
    assert len({(s.num_layers, s.num_heads, s.intermediate_size) for s in shapes.values()}) == 1
    per_token = [cost.kv_bytes_per_token(shape) for shape in shapes.values()]
    assert per_token == [per_token[0] * n // 12 for n in (12, 4, 2, 1)]
    assert bench_kv.num_kv_heads("gqa", 12, 12) == 3, "a quarter where the shape has none"
    assert bench_kv.num_kv_heads("gqa", 8, 1) == 2


def test_random_weights_do_not_repeat_one_token() -> None:
    asked = bench_kv.read_words(WORDS)
    model = bench_kv.shaped_model(bench_kv.shaped_config(asked, "gqa-1"), "fp32").eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert len(set(ids[0, 5:].tolist())) > 3


def test_nothing_without_the_cache_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"gain": None, "context": 64, "batch": 1}
    assert bench_kv._verdict([row]).startswith("no gain was measured: the time did not allow")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "measures one model or shape; 0 are named"),
        (["125m", "25m"], "measures one model or shape; 2 are named"),
        (["125m", "context=0"], "`context=0` is no setting of this benchmark"),
        (["125m", "batch=two"], "`batch=two` is no setting"),
        (["125m", "attention="], "`attention=` is no setting"),
        (["125m", "rounds=3"], "`rounds=3` is no setting"),
        (["runs/mine", "attention=mha"], "which has the attention and tokens"),
    ],
)
def test_words_that_cannot_be_measured_are_told(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        bench_kv.read_words(words)
    assert message in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("latent", "there is no attention called `latent`"),
        ("gqa-0", "there is no attention called `gqa-0`"),
        ("gqa-5", "12 heads cannot share 5 heads of keys and values"),
    ],
)
def test_attention_that_cannot_be_made_is_told(attention: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        bench_kv.num_kv_heads(attention, 12, 4)
    assert message in caught.value.message and caught.value.hint
    with pytest.raises(UserError, match="3 heads cannot be grouped"):
        bench_kv.num_kv_heads("gqa", 3, 3)


def test_options_belong_to_this_benchmark() -> None:
    nothing: dict[str, Any] = {"attention": None, "context": None}
    assert bench.with_options("train", ["model.size=1m"], nothing) == ["model.size=1m"]
    with pytest.raises(UserError, match="--context is an option of `mule bench kv`"):
        bench.with_options("train", [], {"attention": None, "context": "64"})


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="whose cache cannot be left out"):
        bench_kv.compare([str(file)])


# ---------------------------------------------------------------- the study of bench/kv.py


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as for a script that is run
    return importlib.import_module("kv")


def test_the_study_measures_all_models_and_writes_its_page(study: ModuleType) -> None:
    page = study.markdown(study.smoke())
    assert "and the same texts." in page
    for title in ("MHA, bf16", "GQA, bf16", "MQA, bf16", "GQA, fp32"):
        assert page.count(f"| {title} | 16 | yes |") == page.count(f"| {title} | 16 | no |") == 1
    assert "| tokens of text | 16 | 32 |" in page and "Every row was measured." in page


def test_the_page_says_what_is_missing_and_missed(study: ModuleType) -> None:
    found = study.study(study.TINY, 1)
    mha, gqa, *_ = found["models"]
    mha["gains"] = [{"context": 1024, "batch": 1, "gain": 60.0, "predicted": 100.0, "share": 0.6}]
    gqa["gains"] = [{"context": 1024, "batch": 1, "gain": 90.0, "predicted": 100.0, "share": 0.9}]
    mha["not_measured"] = [{"batch": 1, "context": 64, "cached": False, "why": "no time"}]
    mha["same_text"] = False
    found["machine"]["cpu_flags"] = []
    page = study.markdown(found)
    assert (
        "MHA, bf16 at 1,024 tokens: 60.0 times, predicted 100.0, 60%; wanted: 80% (**missed**)"
        in page
    )
    assert "GQA, bf16 at 1,024 tokens: 90.0 times, predicted 100.0, 90%; wanted: 80% (met)" in page
    assert "- MHA, bf16, 64 tokens, without the cache: no time." in page
    assert "**other texts**" in page and "has no bf16 arithmetic" in page
    assert "GQA's cache takes 50% of MHA's: 2 of 4 heads." in page


# ---------------------------------------------------------------- the command line


def test_the_command_shows_a_row_and_keeps_it(mule_cli: Mule) -> None:
    options = ("--attention", "mqa", "--context", "16", "--batch", "2")
    code, out, err = mule_cli("bench", "kv", *WORDS[:1], *options, *WORDS[2:], "--json")
    assert code == 0, err
    shown = json.loads(out)
    (row,) = shown["rows"]
    assert (row["attention"], row["context"], row["batch"]) == ("mqa", 16, 2)
    assert json.loads(Path(shown["file"]).read_text())["rows"] == [row]
    code, _, err = mule_cli("bench", "compile", "--attention", "mqa")
    assert code == 2 and "--attention is an option of `mule bench kv`" in err
