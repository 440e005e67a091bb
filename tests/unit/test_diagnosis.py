"""Small pieces of `mule verify`: entries in words, verdicts, limits, the way towards another model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mule.export.limits import LIMITS, limits_of, wider
from mule.export.metadata_proof import wrong_entries
from mule.export.verify_report import VerifyReport
from mule.export.weights_proof import Lean, sampled

ENTRIES: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 64,
    "llama.rope.freq_base": 1_000_000.0,
    "llama.logit_scale": 3.0,
    "tokenizer.ggml.tokens": [f"t{number}" for number in range(20)],
    "tokenizer.ggml.merges": ["a b", "c d"],
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 3,
    "tokenizer.chat_template": "{{ messages }} of one model, and of no other",
}


def wrong(**changes: Any) -> list[str]:
    """What is told of entries of which some are others; None leaves one out."""
    found = dict(ENTRIES)
    for end, value in changes.items():
        key = next(key for key in found if key.endswith(end.replace("__", ".")))
        found[key] = value
    found = {key: value for key, value in found.items() if value is not None}
    return list(wrong_entries(found, ENTRIES))


def test_the_same_entries_are_right() -> None:
    assert wrong() == []
    assert wrong(freq_base=1_000_000.04) == []  # as 32 bits hold it
    assert wrong(padding_token_id=None, key_length=None) == []  # found by llama.cpp itself
    assert wrong(bos_token_id=7) == []  # never put anywhere
    assert list(wrong_entries(ENTRIES | {"llama.vocab_size": 20}, ENTRIES)) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2', the model's is 'llama'"),
        ({"block_count": 4}, "number of layers 4, the model has 3 (block_count)"),
        ({"freq_base": 1e4}, "RoPE base 10000, the model has 1e+06 (rope.freq_base)"),
        (
            {"freq_base": None},
            "missing RoPE base: the file has none, and llama.cpp takes 10000; the model has 1e+06 "
            "(rope.freq_base)",
        ),
        (
            {"logit_scale": None},
            "missing logit scale: the file has none; the model has 3 (logit_scale)",
        ),
        (
            {"head_count_kv": None},
            "missing number of key/value heads: the file has none, and llama.cpp takes 4; the model "
            "has 2 (attention.head_count_kv)",
        ),
        (
            {"eos_token_id": 5},
            "wrong EOS: token 5 ('t5'), the model's is token 2 ('t2') (tokenizer.ggml.eos_token_id)",
        ),
        (
            {"add_bos_token": True},
            "a BOS too many: the file puts 't2' before a text, the model does not (add_bos_token)",
        ),
        ({"merges": ["a b"]}, "1 merges, the model has 2"),
        (
            {"merges": ["a b", "e f"]},
            "merges: 1 of 2 are others: entry 1 is 'e f', the model's 'c d'",
        ),
        (
            {"tokens": ["t19", *[f"t{number}" for number in range(19)]]},
            "vocabulary shifted by 1: entry 0 is t19, the model's t0",
        ),
        (
            {"chat_template": "{{ messages }} of one mule"},
            "wrong chat template: from character 23 on it reads 'messages }} of one mule', the model's "
            "'messages }} of one model, and of no othe'",
        ),
    ],
)
def test_a_wrong_entry_is_told_in_words(changes: dict[str, Any], told: str) -> None:
    assert wrong(**changes) == [told]


def test_bos_twice_and_none() -> None:
    template = "{{ bos_token }}{{ messages }}"
    found = {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": template}
    (told,) = wrong_entries(ENTRIES | found, ENTRIES | {"tokenizer.chat_template": template})
    assert told == "BOS twice: the file puts 't2' before a text that begins with it (add_bos_token)"
    (told,) = wrong_entries(ENTRIES, ENTRIES | {"tokenizer.ggml.add_bos_token": True})
    assert told == "no BOS: the model's texts begin with one, the file puts none (add_bos_token)"


def test_an_entry_that_the_model_does_not_have() -> None:
    found = ENTRIES | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 1.0}
    assert list(wrong_entries(found, ENTRIES)) == [
        "RoPE scaling yarn, and the model has none (rope.scaling.type)"
    ]
    without = {key: value for key, value in ENTRIES.items() if "chat_template" not in key}
    assert list(wrong_entries(ENTRIES, without)) == ["a chat template, and the model has none"]


# ---------------------------------------------------------------- verdicts


def report(**changes: Any) -> VerifyReport:
    values: dict[str, Any] = {
        "ppl_reference": 10.0,
        "ppl": 10.09,
        "num_prompts": 50,
        "num_greedy_equal": 48,
    }
    values |= changes
    return VerifyReport("m.gguf", "q4_k_m", 1, 4.8, **values)


def test_the_verdict_is_a_sentence() -> None:
    assert report().verdict == (
        "q4_k_m: 0.9% worse perplexity, same answers on 48 of 50 prompts: fine"
    )
    assert report(ppl=9.9, num_prompts=0).verdict == "q4_k_m: 1.0% better perplexity: fine"
    exact = VerifyReport("m.gguf", "f32", 1, 32.0, ppl=2.0, ppl_reference=2.0)
    assert exact.verdict == "f32: same perplexity: the same model"
    assert VerifyReport("m.gguf", "f16", 1, 16.0).verdict == "f16: nothing could be computed: fine"


def test_a_type_that_is_too_small_is_no_other_model() -> None:
    beyond = report(ppl=19.0, weights={"tensors": 3}, failures=["ppl: 19 where the model has 10"])
    assert beyond.verdict == (
        "q4_k_m: 90.0% worse perplexity, same answers on 48 of 50 prompts: too far from the model, "
        "though its weights are what q4_k_m makes of them; use q5_k_m or --imatrix"
    )
    beyond.type = "q8_0"
    assert beyond.verdict.endswith("use f16")
    beyond.failures.insert(0, "weights: gate and up are swapped")
    assert beyond.verdict == "not the same model: weights: gate and up are swapped"
    unproven = report(failures=["ppl: 19 where the model has 10"])
    assert unproven.verdict == "not the same model: ppl: 19 where the model has 10"


def test_the_verdict_says_what_was_not_done() -> None:
    found = report(runtime="Mule")
    found.not_checked("tokens", "no llama.cpp")
    assert found.unchecked == ["tokens"] and found.ok
    assert found.verdict.endswith(
        ": fine (computed by Mule, not in llama.cpp: token ids, template and stops there are not "
        "checked)"
    )
    guessing = report()
    guessing.not_checked("distributions", "untrained")
    assert "; the model is untrained: judged by its weights alone: fine" in guessing.verdict


def test_checks_keep_their_order_and_their_first_failure() -> None:
    found = report()
    assert found.passed("structure", (), "3 tensors")
    assert not found.passed("metadata", ["RoPE base 1", "norm epsilon 2"])
    assert found.failures == ["metadata: RoPE base 1", "metadata: norm epsilon 2"]
    assert [(c.name, c.ok, c.detail) for c in found.checks] == [
        ("structure", True, "3 tensors"),
        ("metadata", False, "RoPE base 1"),
    ]
    values = found.as_dict()
    assert values["checks"][1] == {"name": "metadata", "ok": False, "detail": "RoPE base 1"}
    assert values["kl_mean"] is None and values["ok"] is False
    assert values["ppl_change"] == pytest.approx(0.009)


# ---------------------------------------------------------------- limits


def test_limits_of_types_families_and_experts() -> None:
    assert limits_of("q4_k_m", "llama") is LIMITS["q4_k_m"] and limits_of("q9", "llama") is None
    gemma = limits_of("f32", "gemma3")
    plain = LIMITS["f32"].logit
    assert gemma is not None and gemma.logit and plain and gemma.logit > plain
    routed = limits_of("f32", "llama", routed=True)
    assert routed is not None and routed.logit is None and routed.greedy_margin is None
    assert routed.kl_mean == 10 * LIMITS["f32"].kl_mean


def test_the_wider_of_two_limits() -> None:
    both = wider(LIMITS["f32"], LIMITS["bf16"])
    assert (both.kl_mean, both.ppl) == (LIMITS["bf16"].kl_mean, LIMITS["bf16"].ppl)
    assert both.logit is None and both.greedy_margin == LIMITS["bf16"].greedy_margin
    assert wider(LIMITS["f32"], LIMITS["f32"]) == LIMITS["f32"]


# ---------------------------------------------------------------- towards another model


@pytest.mark.parametrize(("share", "noise"), [(1.0, 0.0), (-1.0, 0.05), (0.5, 0.3), (1.0, 1.0)])
def test_small_changes_are_found_below_the_rounding(share: float, noise: float) -> None:
    """The way to the other model is a tenth of what rounding to four bits hides it in."""
    draw = np.random.default_rng(0)
    towards = np.float32(0.01) * draw.standard_normal((48, 256), np.float32)
    error = np.float32(share) * towards
    error += np.float32(0.1 * noise) * draw.standard_normal((48, 256), np.float32)
    lean = Lean()
    for _ in range(20):
        lean.add(error, towards, 0.1 * noise)
    assert lean.is_sure and lean.share == pytest.approx(share, abs=0.25)


def test_weights_of_a_stranger_lean_nowhere() -> None:
    """Half of the way to the base, seen along it, are all weights that have nothing to do with it."""
    draw = np.random.default_rng(1)
    model, base = (draw.standard_normal((48, 256), np.float32) for _ in range(2))
    stranger = draw.standard_normal((48, 256), np.float32)
    lean = Lean()
    lean.add(stranger - model, base - model, 0.05)
    assert lean.share == pytest.approx(0.5, abs=0.1) and not lean.is_sure
    assert not Lean().is_sure and Lean().share == 0


def test_sampled_rows_hold_both_ends() -> None:
    assert sampled(3).tolist() == [0, 1, 2]
    rows = sampled(1000)
    assert len(rows) == 48 and rows[0] == 0 and rows[-1] == 999
    assert math.isclose(np.diff(rows).std(), 0, abs_tol=1)
