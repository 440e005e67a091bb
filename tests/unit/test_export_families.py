"""config.json and weight names in the terms of llama.cpp."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mule.errors import ModelError
from mule.export.families import (
    FAMILIES,
    expected_weights,
    interleave_heads,
    read_shape,
)

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 6,
    "long_factor": [2.0] * 6,
    "original_max_position_embeddings": 64,
}
GEMMA = {"model_type": "gemma3_text", "query_pre_attn_scalar": 12, "sliding_window": 16}
_MAMBA = {"mamba_expand": 2, "mamba_d_state": 8, "mamba_d_conv": 4}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
HYBRID = {
    "model_type": "granitemoehybrid",
    "shared_intermediate_size": 40,
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    **_MAMBA,
}
JAMBA = {
    "model_type": "jamba",
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_dt_rank": 5,
    "num_experts": 1,
    **_MAMBA,
}
# What config.json of a family has that of Llama has not.
OWN: dict[str, dict[str, Any]] = {
    "gemma3_text": GEMMA,
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"shared_intermediate_size": 40, **_EXPERTS},
    "granitemoehybrid": HYBRID | _EXPERTS,
    "jamba": JAMBA | {"num_experts": 4, "num_experts_per_tok": 2},
}


def shape_of(folder: Path, **changes: Any) -> Any:
    own = OWN.get(changes.get("model_type", ""), {})
    (folder / "config.json").write_text(json.dumps(CONFIG | own | changes))
    return read_shape(folder)


def names(folder: Path, family: str = "llama", **changes: Any) -> set[str]:
    """The weights that a model of this config has."""
    entry, shape = shape_of(folder, model_type=family, **changes)
    found = {"model.embed_tokens.weight", f"{entry.last_norm}.weight"}
    for layer in range(shape.layers):
        found |= {f"model.layers.{layer}.{name}" for name in entry.words(shape, layer)}
        if entry.always_biased:
            found |= {f"model.layers.{layer}.{name}.bias" for name in entry.biases}
    return found


def test_sizes_that_config_leaves_out_are_derived(tmp_path: Path) -> None:
    _, shape = shape_of(tmp_path, num_key_value_heads=None)
    assert (shape.head_dim, shape.kv_heads, shape.query, shape.key) == (12, 4, 48, 48)
    _, shape = shape_of(tmp_path, head_dim=20)
    assert (shape.query, shape.key) == (80, 40)


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 50_000}, 50_000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
        ({"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, 7e4),
    ],
)
def test_both_spellings_of_the_rope_base(
    tmp_path: Path, changes: dict[str, Any], theta: float
) -> None:
    assert shape_of(tmp_path, **changes)[1].rope.theta == theta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' cannot be written as GGUF"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', and llama.cpp computes only 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "RoPE scaling 'dynamic' cannot be written"),
        ({"rope_parameters": YARN | {"beta_fast": 64.0}}, "beta_fast = 64.0, and llama.cpp comp"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate = False, and llama.cpp comp"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "RoPE scaling 'yarn' without 'factor'"),
        ({"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "long_factor holds 1 numbers"),
        ({"model_type": "qwen2", "rope_parameters": LLAMA3}, "RoPE scaling 'llama3' cannot be"),
        (GEMMA | {"query_pre_attn_scalar": 5}, "query_pre_attn_scalar = 5, and llama.cpp divides"),
        (GEMMA | {"layer_types": ["full_attention", "sliding_attention"]}, "all but every 6th"),
        (GEMMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (GEMMA | {"rope_parameters": {"full_attention": YARN}}, "yarn beside sliding windows"),
        ({"model_type": "smollm3", "no_rope_layers": [0, 1]}, "layers without RoPE other than"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is set"),
        ({"quantization_config": {"bits": 4}}, "already quantised"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window = True"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob = False, and llama"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "some layers have no experts"),
        (HYBRID | {"layer_types": ["attention"] * 2}, "no layer is a Mamba one"),
        (HYBRID | {"layer_types": ["mamba"] * 2}, "with a layer of zeros behind the last"),
        (HYBRID | {"mamba_expand": 1}, "48 channels in its Mamba layers; llama.cpp computes twice"),
        (HYBRID | {"mamba_conv_bias": False}, "mamba_conv_bias = False, and llama.cpp adds one"),
        (HYBRID | {"mamba_proj_bias": True}, "mamba_proj_bias = True, and llama.cpp computes only"),
        (HYBRID | {"time_step_limit": [0.0, 0.5]}, "time_step_limit = [0, 0.5], and llama.cpp has"),
        (JAMBA | {"head_dim": 20}, "heads of another width than hidden_size / num_attention_heads"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as error:
        shape_of(tmp_path, **changes)
    assert message in error.value.message
    assert error.value.hint


def test_a_missing_key_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not a model folder \(no config.json\)"):
        read_shape(tmp_path)
    raw = {key: value for key, value in CONFIG.items() if key != "rms_norm_eps"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="no 'rms_norm_eps'"):
        read_shape(tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_weight_is_expected_with_its_shape(tmp_path: Path, family: str) -> None:
    found = names(tmp_path, family)
    expected = expected_weights(*read_shape(tmp_path), found)
    assert set(expected) == found
    if family == "phi3":
        assert expected["model.layers.1.self_attn.qkv_proj.weight"] == (96, 48)
        assert expected["model.layers.1.mlp.gate_up_proj.weight"] == (160, 48)
    else:
        assert expected["model.layers.1.self_attn.k_proj.weight"] == (24, 48)
    if family not in OWN or family == "gemma3_text":
        assert expected["model.layers.0.mlp.down_proj.weight"] == (48, 80)
    normed = "model.layers.0.self_attn.q_norm.weight" in expected
    assert normed == (family in ("qwen3", "qwen3_moe", "gemma3_text"))
    assert ("model.layers.0.self_attn.v_proj.bias" in expected) == (family == "qwen2")


def test_a_bias_is_written_where_the_model_has_one(tmp_path: Path) -> None:
    found = names(tmp_path) | {"model.layers.1.self_attn.k_proj.bias"}
    assert expected_weights(*read_shape(tmp_path), found)[max(found)] == (48,)
    assert "model.layers.1.self_attn.k_proj.bias" in expected_weights(*read_shape(tmp_path), found)
    with pytest.raises(ModelError, match=r"no place in a GGUF file, first .*k_proj\.bias"):
        expected_weights(*shape_of(tmp_path, model_type="mistral"), found)
    found = names(tmp_path, "qwen2") - {"model.layers.0.self_attn.v_proj.bias"}
    with pytest.raises(
        ModelError, match=r"missing, first model\.layers\.0\.self_attn\.v_proj\.bias"
    ):
        expected_weights(*read_shape(tmp_path), found)


def test_keys_of_the_families(tmp_path: Path) -> None:
    rope = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}
    _, gemma = shape_of(tmp_path, **GEMMA, rope_parameters=rope)
    assert gemma.keys == {
        "{arch}.attention.sliding_window": 16,
        "{arch}.rope.freq_base_swa": 2e4,
    }
    assert gemma.rope.theta == 5e5
    older = {"rope_theta": 1_000_000, "rope_local_base_freq": 10_000, "sliding_window_pattern": 6}
    _, gemma = shape_of(tmp_path, **GEMMA, **older)
    assert (gemma.rope.theta, gemma.keys["{arch}.rope.freq_base_swa"]) == (1e6, 1e4)
    everywhere = {"layer_types": ["full_attention"] * 2, "final_logit_softcapping": 30}
    _, gemma = shape_of(tmp_path, **GEMMA, **everywhere, rope_parameters={"full_attention": YARN})
    assert gemma.keys == {"{arch}.final_logit_softcapping": 30.0}
    _, granite = shape_of(tmp_path, model_type="granite", logits_scaling=8)
    assert granite.keys["{arch}.logit_scale"] == 8.0 and granite.keys["{arch}.attention.scale"] == 1


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_window_that_llama_cpp_has_not_is_said(tmp_path: Path, family: str) -> None:
    _, shape = shape_of(tmp_path, model_type=family, sliding_window=100)
    assert shape.notes == [
        "attention reaches 100 tokens back in the model and all the way in llama.cpp: beyond 100 "
        "tokens the answers differ"
    ]
    assert shape.exact_context == 100
    _, shape = shape_of(tmp_path, model_type=family, sliding_window=128)
    assert shape.notes == [] and shape.exact_context == 128


def test_long_factors_from_the_first_token_are_said(tmp_path: Path) -> None:
    _, shape = shape_of(tmp_path, rope_parameters=LONGROPE)
    assert shape.exact_context == 64
    assert shape.notes == [
        "opened with a context above 64 tokens, llama.cpp uses the factors for long texts from the "
        "first token, the model only beyond: short answers differ"
    ]


def test_the_head_is_written_unless_tied(tmp_path: Path) -> None:
    found = names(tmp_path) | {"lm_head.weight"}
    for tied, written in ((True, False), (False, True), (None, True)):
        shape = shape_of(tmp_path, tie_word_embeddings=tied)
        assert ("lm_head.weight" in expected_weights(*shape, found)) == written


def test_missing_and_unknown_weights_are_refused(tmp_path: Path) -> None:
    found = names(tmp_path)
    known = read_shape(tmp_path)
    with pytest.raises(ModelError, match=r"1 weights are missing, first model\.norm\.weight"):
        expected_weights(*known, found - {"model.norm.weight"})
    with pytest.raises(ModelError, match=r"no place in a GGUF file, first base_model\.x\.lora_A"):
        expected_weights(*known, found | {"base_model.x.lora_A"})
    expected_weights(*known, found | {"model.layers.0.self_attn.rotary_emb.inv_freq"})


def test_interleaving_pairs_the_halves_of_each_head() -> None:
    weight = np.arange(2 * 6 * 3).reshape(12, 3)  # 2 heads of 6 rows
    rows = interleave_heads(weight, 2)[:, 0] // 3
    assert rows.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert interleave_heads(np.arange(12), 2).tolist() == rows.tolist()


def test_llama3_factors_are_transformers(tmp_path: Path) -> None:
    _, shape = shape_of(tmp_path, rope_parameters=LLAMA3, head_dim=16)
    config = LlamaConfig(head_dim=16, max_position_embeddings=512, rope_parameters=dict(LLAMA3))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500_000.0 ** (-np.arange(0, 16, 2) / 16)
    factors = shape.rope.factors["rope_freqs.weight"]
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert factors[0] == 1 and factors[-1] == 8
    assert shape_of(tmp_path)[1].rope.factors == {}


def test_longrope_and_yarn_scale_as_in_transformers(tmp_path: Path) -> None:
    _, shape = shape_of(tmp_path, rope_parameters=LONGROPE)
    config = LlamaConfig(head_dim=12, max_position_embeddings=128, rope_parameters=dict(LONGROPE))
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, device="cpu")
    assert shape.rope.keys["{arch}.rope.scaling.attn_factor"] == pytest.approx(attention)
    assert shape.rope.factors["rope_factors_long.weight"].tolist() == [2.0] * 6
    by_hand = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}
    _, shape = shape_of(tmp_path, rope_parameters=by_hand)
    config = LlamaConfig(head_dim=12, max_position_embeddings=128, rope_parameters=by_hand)
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    written = shape.rope.keys["{arch}.rope.scaling.attn_factor"]
    assert written * (0.1 * math.log(4.0) + 1.0) == pytest.approx(attention)
    _, shape = shape_of(tmp_path, rope_parameters=YARN)
    assert "{arch}.rope.scaling.attn_factor" not in shape.rope.keys
