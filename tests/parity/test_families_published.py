"""Configs of models on the hub are read as they are; what Mule cannot compute is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mule.errors import ModelError
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.families import SUPPORTED, family
from mule.models.folder import read_config
from tests.parity.published import FULL, PUBLISHED, SLIDING


def read(name: str, **changes: Any) -> ModelConfig:
    raw = PUBLISHED[name][1] | changes
    return family(raw["model_type"]).from_hf(raw)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_their_parameters_counted(name: str) -> None:
    config = read(name)
    assert cost.total_params(config) == PUBLISHED[name][0]
    assert family(config.family).from_hf(family(config.family).to_hf(config)) == config
    json.dumps(family(config.family).to_hf(config))


def test_every_family_has_a_published_model() -> None:
    assert {raw["model_type"] for _, raw in PUBLISHED.values()} == set(SUPPORTED)


def test_what_the_families_say() -> None:
    llama = read("meta-llama/Llama-3.2-1B-Instruct")
    assert llama.rope_scaling is not None and llama.rope_scaling.kind == "llama3"
    assert read("Qwen/Qwen2.5-0.5B-Instruct").qkv_bias
    assert read("Qwen/Qwen2.5-0.5B-Instruct").sliding_layers == ()
    small, one = read("google/gemma-3-270m-it"), read("google/gemma-3-1b-it")
    assert small.sliding_layers == tuple(i for i in range(18) if i % 6 != 5)
    assert one.sliding_layers == tuple(i for i in range(26) if i % 6 != 5)
    assert (small.rope_theta, small.rope_local_theta, small.tie_embeddings) == (1e6, 1e4, True)
    assert small.attention_scale is None and small.embedding_scale == 640**0.5
    assert read("HuggingFaceTB/SmolLM3-3B").nope_layers == tuple(range(3, 36, 4))
    phi = read("microsoft/Phi-4-mini-instruct")
    assert phi.rotary_dim == 96 and phi.rope_scaling is not None
    assert phi.rope_scaling.original_max_position_embeddings == 4096
    granite = read("ibm-granite/granite-3.3-2b-instruct")
    assert (granite.logit_scale, granite.residual_scale) == (1 / 8, 0.22)
    moe = read("Qwen/Qwen3-30B-A3B").moe
    assert moe is not None and (moe.num_experts, moe.experts_per_token) == (128, 8)
    assert moe.renormalize and moe.layers is None and moe.shared_intermediate_size == 0
    shared = read("ibm-research/moe-7b-1b-active-shared-experts")
    assert shared.attention_scale == 1 / 128 and shared.moe is not None
    assert (shared.moe.intermediate_size, shared.moe.shared_intermediate_size) == (512, 1024)
    rnj = read("EssentialAI/rnj-1-instruct")
    assert rnj.sliding_layers == () and rnj.logit_softcap == 30.0
    assert rnj.rope_scaling is not None and rnj.rope_scaling.kind == "yarn"


def test_layers_of_rnj_that_contradict_each_other_are_refused() -> None:
    name = "EssentialAI/rnj-1-instruct"
    with pytest.raises(ModelError, match=r"one thing in layer_type and .*\nhint: ask the model's"):
        read(name, sliding_window_pattern=6)
    with pytest.raises(ModelError, match="one thing in layer_type"):
        read(name, layer_types=[FULL, SLIDING] * 16)


def test_wrong_layer_types_are_refused() -> None:
    name = "google/gemma-3-270m-it"
    with pytest.raises(
        ModelError, match=r"sets layer_types = \['chunked.*\nhint: .*full_attention"
    ):
        read(name, layer_types=["chunked_attention"] * 18)
    with pytest.raises(ModelError, match="sets layer_types"):
        read(name, layer_types=[FULL] * 17)
    with pytest.raises(ModelError, match=r"sliding layers and sliding_window = None\nhint: down"):
        read(name, sliding_window=None)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("google/gemma-3-1b-it", "attn_logit_softcapping", 50.0),
        ("google/gemma-3-1b-it", "use_bidirectional_attention", True),
        ("google/gemma-3-1b-it", "hidden_activation", "relu"),
        ("meta-llama/Llama-3.2-1B-Instruct", "hidden_act", "gelu"),
        ("meta-llama/Llama-3.2-1B-Instruct", "rope_interleaved", True),
        ("meta-llama/Llama-3.2-1B-Instruct", "partial_rotary_factor", 0.5),
        ("mistralai/Mistral-7B-Instruct-v0.3", "attention_bias", True),
        ("Qwen/Qwen2.5-Coder-1.5B", "use_mrope", True),
        ("microsoft/Phi-4-mini-instruct", "lm_head_bias", True),
        ("microsoft/Phi-4-mini-instruct", "mlp_bias", True),
        ("ibm-granite/granite-3.3-2b-instruct", "num_local_experts", 8),
    ],
)
def test_keys_that_change_the_computation_are_refused(name: str, key: str, value: Any) -> None:
    with pytest.raises(
        ModelError, match=f"sets {key} = .*which Mule does not compute\nhint: use a"
    ):
        read(name, **{key: value})


@pytest.mark.parametrize(
    "key, value, what",
    [
        ("hidden_size", "640", "a whole number above 0"),
        ("num_attention_heads", 0, "a whole number above 0"),
        ("sliding_window", -1, "a whole number above 0"),
        ("layer_types", "full_attention", "a list"),
        ("rope_scaling", 8.0, "a table"),
    ],
)
def test_values_of_a_wrong_type_are_refused(key: str, value: Any, what: str) -> None:
    with pytest.raises(ModelError, match=f"sets {key} = .*is not {what}\nhint: download"):
        read("google/gemma-3-270m-it", **{key: value})
    with pytest.raises(ModelError, match=r"config.json has no 'hidden_size'\nhint: download"):
        raw = PUBLISHED["microsoft/Phi-4-mini-instruct"][1]
        family("phi3").from_hf({key: raw[key] for key in raw if key != "hidden_size"})


def test_experts_in_some_blocks_are_read_and_written() -> None:
    name = "Qwen/Qwen3-30B-A3B"
    some = read(name, decoder_sparse_step=4, mlp_only_layers=[3, 47])
    assert some.moe is not None and some.moe.layers == tuple(range(7, 47, 4))
    raw = family("qwen3_moe").to_hf(some)
    assert raw["decoder_sparse_step"] == 1 and len(raw["mlp_only_layers"]) == 38
    assert family("qwen3_moe").from_hf(raw) == some
    plain = read(name, norm_topk_prob=None)
    assert plain.moe is not None and not plain.moe.renormalize  # as the class has it
    with pytest.raises(ModelError, match=r"mlp_only_layers = \[48\] for 48 blocks.*\nhint: down"):
        read(name, mlp_only_layers=[48])
    with pytest.raises(ModelError, match="9 experts a token of 8 in all"):
        read(name, num_experts=8, num_experts_per_tok=9)


def test_what_a_family_cannot_express_is_refused() -> None:
    qwen, granite = read("Qwen/Qwen3-30B-A3B"), read("ibm-research/moe-7b-1b-active-shared-experts")
    assert qwen.moe is not None and granite.moe is not None
    for config, says in (
        (replace(qwen, moe=None), "none that all tokens share\nhint: set model.family=granitemoes"),
        (replace(qwen, moe=granite.moe), "none that all tokens share\nhint: set model.family=gra"),
        (replace(qwen, sliding_window=9, sliding_layers=(1,)), "in some\nhint: remove model.slid"),
        (
            replace(granite, moe=replace(granite.moe, layers=(1,))),
            "every block of granitemoeshared",
        ),
        (
            replace(granite, moe=replace(granite.moe, renormalize=False)),
            "weights add up to 1\nhint",
        ),
    ):
        with pytest.raises(ModelError, match=says):
            family(config.family).to_hf(config)


def test_gemma_with_eyes_and_unknown_types_are_refused(tmp_path: Path) -> None:
    raw = {"model_type": "gemma3", "text_config": {}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        ModelError, match=r"reads images too .*\nhint: .*gemma-3-1b-it.*gemma3_text"
    ):
        read_config(tmp_path)
    with pytest.raises(ModelError, match="not a family that Mule knows") as caught:
        family("mixtral")
    assert caught.value.hint == f"use a model of one of these: {', '.join(SUPPORTED)}"


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_weights_are_refused_with_the_way_out(method: str, tmp_path: Path) -> None:
    raw = PUBLISHED["Qwen/Qwen2.5-0.5B-Instruct"][1]
    settings = {"quant_method": method, "bits": 4}
    raw = raw | {"quantization_config": settings, "_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"quantised .*\nhint: .*Qwen/Qwen2.5-0.5B-Instruct"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match="sets quantization_config"):
        family("qwen2").from_hf(raw)


def test_costs_count_windows_biases_and_caches() -> None:
    gemma = read("google/gemma-3-270m-it")
    length = 4096
    full = 12 * 3 * length / 2 * 4 * 256
    seen = sum(min(i + 0.5, 512) for i in range(length)) / length  # a token sees half of itself
    matrices = 18 * (640 * 256 * (4 + 4 + 2) + 3 * 640 * 2048) + 262144 * 640
    expected = 6 * matrices + full + 12 * 15 * seen * 4 * 256
    assert cost.train_flops_per_token(gemma, length) == pytest.approx(expected, rel=1e-4)
    assert cost.lora_flops_per_token(gemma, length) == pytest.approx(
        expected - 2 * matrices, rel=1e-4
    )
    assert cost.matmul_params(gemma) == matrices
    assert cost.train_flops_per_token(gemma, 300) == 6 * matrices + 6 * 18 * 300 * 4 * 256
    assert cost.kv_bytes_per_token(gemma) == 2 * 18 * 256 * 2
