"""The tables of the demo and of verify, read as a user would."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mule.cli import tables

STAGES = [
    {"stage": "pretrain", "exact_match": 0.5, "exact_match_unseen": 0.25, "persona": None},
    {
        "stage": "gguf-f16",
        "exact_match": 0.97,
        "exact_match_unseen": 0.9,
        "persona": 1.0,
        "size_bytes": 3 * 2**20,
        "ppl": 2.25,
        "ppl_reference": 2.2,
        "different_answers": 2,
        "widest_margin": 0.00123,
    },
    {
        "stage": "merged",
        "exact_match": 0.97,
        "exact_match_unseen": 0.9,
        "persona": 1.0,
        "different_answers": 0,
        "widest_margin": 0.0,
    },
]
FILE = {
    "file": "exports/a/a-Q8_0.gguf",
    "size_bytes": 2**20,
    "tokens_equal": True,
    "ok": True,
    "kl_mean": 2.1e-5,
    "kl_p99": None,
    "top1": 0.9932,
    "ppl_reference": 2.2,
    "ppl": 2.25,
    "ppl_change": 0.0227,
    "bits_per_weight": 8.5,
    "runtime": "llama.cpp",
    "tokens_per_second": 58.8,
    "reference_tokens_per_second": 12.5,
    "verdict": "q8_0: 2.3% worse perplexity, same answers on 4 of 5 prompts: fine",
    "checks": [{"name": "weights", "ok": True, "detail": "30 tensors"}],
    "num_greedy_equal": 4,
    "num_prompts": 5,
    "stops": True,
    "failures": [],
    "notes": [],
}


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_demo_shows_each_stage_france_and_the_agreement(screen: Console) -> None:
    stages = [{"seconds": 7.4, "france": f"Paris, says {s['stage']}."} | s for s in STAGES]
    tables.show_demo(screen, {"stages": stages, "file": "demo/exports/a.gguf"})
    text = shown(screen)
    assert "pretrain      Paris, says pretrain." in text
    row = next(line for line in text.splitlines() if line.startswith("gguf-f16 "))
    assert row.split() == [
        *("gguf-f16", "97%", "90%", "100%", "3", "MiB", "2.250", "(model", "2.200)", "7")
    ]
    assert "gguf-f16: 2 answers differ from the adapter's, where its two best logits" in text
    assert "at most 1.2e-03 apart" in text
    assert "merged: every answer is the adapter's, token for token" in text
    assert "demo/exports/a.gguf" in text


def test_export_shows_files_notes_and_the_next_programs(screen: Console) -> None:
    file = {"file": "exports/a/a-F16.gguf", "size_bytes": 2**20, "bits_per_weight": 16.014}
    file |= {"pre_tokenizer": "gpt-2", "seconds": 0.13, "fallbacks": ["blk.0: Q5_0"]}
    file |= {"notes": ["1 of 2 tensors have rows (96)"]}
    result = {"folder": "exports/a", "files": [file], "ollama": ["ollama run a"], "docker": []}
    tables.show_export(screen, result)
    text = shown(screen)
    row = next(line for line in text.splitlines() if line.startswith("exports/a/a-F16.gguf  "))
    assert row.split() == ["exports/a/a-F16.gguf", "1", "MiB", "16.01", "gpt-2", "0.1"]
    assert (
        "exports/a/a-F16.gguf: 1 of 2 tensors have rows (96)" in text and "  ollama run a" in text
    )


def test_verify_shows_figures_and_what_failed(screen: Console) -> None:
    failed = {"name": "stops", "ok": False, "detail": "eos is missing"}
    bad = FILE | {
        "ok": False,
        "stops": False,
        "verdict": "not the same model: stops: eos is missing",
    }
    bad |= {"failures": ["stops: eos is missing", "stops: token 3 ends nothing"]}
    bad |= {"checks": [*FILE["checks"], failed]}
    tables.show_verify(screen, {"against": "exports/a/merged", "files": [FILE, bad]})
    text = shown(screen)
    assert "In llama.cpp, beside exports/a/merged" in text
    good, other = (line for line in text.splitlines() if line.startswith("a-Q8_0.gguf"))
    for figure in ("8.50", "2.1e-05", "99.32%", "4/5", "2.250 (+2.27%)", "58.8 (12.5)"):
        assert figure in good
    assert good.rstrip().endswith("ok") and other.rstrip().endswith("FAILED")
    assert "exports/a/a-Q8_0.gguf\n  q8_0: 2.3% worse perplexity" in text
    assert "  not the same model: stops: eos is missing\n" in text
    assert (
        "  weights       ok           30 tensors\n  stops         FAILED       eos is missing"
        in text
    )
    assert text.rstrip().endswith("stops: token 3 ends nothing")


def test_verify_says_what_was_not_checked(screen: Console) -> None:
    unchecked = {"name": "tokens", "ok": None, "detail": "llama.cpp is not installed here"}
    file = FILE | {"runtime": "Mule", "tokens_equal": None, "stops": None, "ppl": None}
    file |= {"tokens_per_second": None, "checks": [*FILE["checks"], unchecked]}
    tables.show_verify(screen, {"against": "m", "files": [file]})
    text = shown(screen)
    assert "In Mule, beside m" in text
    assert "  tokens        not checked  llama.cpp is not installed here" in text
    assert "  weights       ok" not in text


def test_merge_shows_what_was_proven(screen: Console) -> None:
    near = {"max_logit_difference": 0.021, "kl_mean": 8.2e-7, "top1": 1.0}
    far = {"max_logit_difference": 5.2, "kl_mean": 0.5, "top1": 0.057}
    result = {
        "folder": "exports/a/merged",
        "dtype": "bf16",
        "num_layers": 35,
        "size_bytes": 2**20,
        "quantized": {"quantized": near, "original": far},
        "proof": {
            "against_adapter": near,
            "base_against_adapter": far,
            "arithmetic": 3e-6,
            "rounding": 0.021,
            "probe_tokens": 209,
        },
    }
    tables.show_merge(screen, result)
    text = shown(screen)
    assert "Merged into exports/a/merged" in text
    assert "against the adapter on its base in 4 bits" in text
    row = next(line for line in text.splitlines() if line.startswith("merged, as written (bf16)"))
    assert row.split()[-3:] == ["2.1e-02", "8.2e-07", "100.0%"]
    assert "merged onto the original base, fp32" in text and "5.7%" in text
    assert "35 matrices changed, 1 MiB" in text and "at most 3.0e-06" in text
    tables.show_merge(screen, result | {"quantized": None})
    assert "in 4 bits" not in shown(screen).removeprefix(text)
