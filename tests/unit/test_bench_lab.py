"""bench/lab.py: what takes turns, what it comes to, and the page. No time is tested."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mule import machine
from mule.commands import docs
from mule.config.lab import BudgetSection
from mule.errors import UserError
from mule.models.solve import solve_all

SCRIPTS = Path(__file__).resolve().parents[2] / "bench"
STAMP = {
    "date": "2026-11-21",
    "command": "python bench/lab.py run",
    "machine": {"cpu": "A CPU", "cores": 2},
}


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as for a script that is run
    return importlib.import_module("lab")


@pytest.mark.slow
def test_a_variant_is_trained_in_turns_with_the_dense_model(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "matmul_peak", lambda *given, **more: 1e12)
    monkeypatch.setattr(lab, "VARIANTS", {"mha": lab.VARIANTS["mha"]})
    found = lab.training(lab.TINY)
    (dense,) = found["variants"].values()
    assert dense["precision"] == "fp32" and dense["threads"] == 1
    assert dense["active_params"] == pytest.approx(6e6, rel=0.02)
    flops = dense["tokens_per_second"] * dense["flops_per_token"]
    assert dense["share_of_peak"] == pytest.approx(flops / 1e12) and dense["beside_dense"] > 0
    size = f"{dense['active_params'] / 1e6:.2f}"
    assert f"| mha | {size} / {size} M |" in lab.training_text(found | STAMP)


def test_all_variants_have_a_recipe_of_equal_active_parameters(lab: ModuleType) -> None:
    plan = lab.Plan()
    budget = BudgetSection(active_params=plan.active_params)
    solved = solve_all(
        budget, lab.VARIANTS, vocab_size=plan.vocab_size, max_seq_length=plan.row_length
    )
    words = {name: lab.words_of(name, solved[name], plan) for name in lab.VARIANTS}
    assert next(iter(words)) == lab.DENSE and len(words) == 7
    assert "model.moe.capacity_factor=1.0" in words["moe-capacity"]
    assert "model.moe.overflow=drop" in words["moe-capacity"]
    assert all("train.compile=true" in found for found in words.values())
    assert all(abs(one.residual) <= 0.015 for one in solved.values())


def test_a_variant_is_compared_with_the_turn_before_it(lab: ModuleType) -> None:
    facts = {"mha": {"flops_per_token": 100.0}, "moe": {"flops_per_token": 200.0}}
    rounds = [
        {
            "peak_flops": 1e6,
            "turns": {
                "mha": {"dense_tokens_per_second": 1000.0, "tokens_per_second": 1000.0},
                "moe": {"dense_tokens_per_second": dense, "tokens_per_second": 300.0},
            },
        }
        for dense in (1000.0, 500.0, 750.0)
    ]
    found = lab.judged(facts, rounds)
    moe = found["variants"]["moe"]
    assert moe["share_of_peak"] == pytest.approx(0.06)
    assert moe["beside_dense"] == pytest.approx(0.8), "300 x 200 of 750 x 100: the median round"
    assert found["variants"]["mha"]["beside_dense"] == 1.0


def _cache_row(**more: Any) -> dict[str, Any]:
    return {
        "attention": "mha",
        "context": 1024,
        "batch": 1,
        "tokens_per_second": 64.0,
        "uncached_tokens_per_second": 0.64,
        "gain": 100.0,
        "predicted_gain": 110.0,
        "share_of_prediction": 0.91,
        "same_text": True,
    } | more


def test_the_page_says_what_was_met_and_missed(lab: ModuleType) -> None:
    variant = {"active_params": 1e7, "total_params": 3e7, "tokens_per_second": 1500.0}
    variant |= {"flops_per_token": 6e7, "share_of_peak": 0.3, "first_update_s": 30.0}
    variant |= {"precision": "bf16"}
    training = {"peak_flops": 3e11, "target": 0.8, "active_params": "10m", "vocab_size": 4096}
    training |= {"row_length": 512, "compile": True, "rounds": 3, "updates_a_turn": 2}
    training["variants"] = {
        "mha": variant | {"beside_dense": 1.0},
        "mamba2": variant | {"beside_dense": 0.5},
    }
    row = {"what": "SSD", "ours_s": 0.01, "other": "a scan", "other_s": 0.05, "times": 5.0}
    row |= {"target": 3.0, "note": "Forward alone."}
    cache = [_cache_row(), _cache_row(share_of_prediction=0.6, same_text=False)]
    cache.append(_cache_row(gain=None))
    found = {
        "training": training | STAMP,
        "ssd": {"rows": [row, row | {"times": 2.0}, row | {"target": None}]} | STAMP,
        "kv": {"target": 0.8, "precisions": {"bf16": {"model": "125m", "rows": cache}}} | STAMP,
    }
    text = lab.section_of(found)
    assert "| 30.0% | 100% |" in text and "| 50% (**missed**) |" in text
    assert "**5.0 times** as fast; wanted: 3 (met). Forward alone." in text
    assert "**2.0 times** as fast; wanted: 3 (**missed**)." in text
    assert "**100.0 times**, 91% of the 110.0 predicted; wanted: 80% (met); the same text." in text
    assert "wanted: 80% (**missed**); **another text**." in text
    assert "the time did not allow a token without it" in text
    assert text.count("A CPU, 2 cores, 2026-11-21; `python bench/lab.py run`") == 3
    assert lab.section_of({}) == "Not measured yet: `python bench/lab.py run`.\n"


def test_the_page_has_a_place_for_it(lab: ModuleType) -> None:
    page = lab.PAGE.read_text(encoding="utf-8")
    assert docs.with_generated(page, lab.section(), "lab") == page, "python bench/lab.py report"


def test_the_words_of_run(lab: ModuleType) -> None:
    names, plan = lab.plan_of(["training", "rounds=5"])
    assert names == ["training"] and plan == lab.Plan(rounds=5)
    with pytest.raises(UserError, match="`updates` says nothing here"):
        lab.plan_of(["updates=5"])
    with pytest.raises(UserError, match="there is no part called `speed`"):
        lab.run(["speed"], plan)


def test_a_process_that_ends_is_told(lab: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a process that trains ended with 1"):
        with lab._worker(["model.size=none"], tmp_path):
            pass


def test_the_cache_is_measured_in_both_precisions(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)
    found = lab.kv(lab.TINY)
    assert set(found["precisions"]) == {"bf16", "fp32"}
    for measured in found["precisions"].values():
        (row,) = measured["rows"]
        assert row["attention"] == "gqa" and row["context"] == 32
    assert "KV cache, 2m gqa, fp32, 32 tokens" in lab.kv_text(found | STAMP)


def test_the_recurrence_is_compared_with_a_scan(lab: ModuleType) -> None:
    found = lab.ssd(lab.TINY)
    text = lab.algorithm_text(found | STAMP)
    assert "Mamba-2 of width 64, 48 tokens" in text and "a sequential scan" in text


@pytest.mark.slow
def test_everything_is_measured_at_tiny_sizes(lab: ModuleType) -> None:
    found = lab.smoke()
    assert list(found) == ["training", "ssd", "moe", "kv"]
    assert list(found["training"]["variants"]) == list(lab.VARIANTS)
    assert all(row["times"] > 0 for row in found["moe"]["rows"])
