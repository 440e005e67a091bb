"""config.json and weight names in the terms of llama.cpp."""

from __future__ import annotations

import json
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
    rope_factors,
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


def shape_of(folder: Path, **changes: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return read_shape(folder)


def names(folder: Path, family: str = "llama", **changes: Any) -> set[str]:
    """The weights that a model of this config has."""
    entry, shape = shape_of(folder, model_type=family, **changes)
    found = {"model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(shape.layers):
        found |= {f"model.layers.{layer}.{name}.weight" for name in entry.layer}
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
    assert shape_of(tmp_path, **changes)[1].rope_theta == theta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' cannot be written as GGUF"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', and llama.cpp computes only 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "RoPE scaling 'yarn' cannot be written"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is set"),
        ({"quantization_config": {"bits": 4}}, "already quantised"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window = True"),
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
    found = names(tmp_path, family) | {"model.layers.1.self_attn.k_proj.bias"}
    expected = expected_weights(*read_shape(tmp_path), found)
    assert set(expected) == found
    assert expected["model.layers.1.self_attn.k_proj.weight"] == (24, 48)
    assert expected["model.layers.1.self_attn.k_proj.bias"] == (24,)
    assert expected["model.layers.0.mlp.down_proj.weight"] == (48, 80)
    assert ("model.layers.0.self_attn.q_norm.weight" in expected) == (family == "qwen3")


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
    factors = rope_factors(shape)
    assert factors is not None
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert factors[0] == 1 and factors[-1] == 8
    assert rope_factors(shape_of(tmp_path)[1]) is None
