"""Models with state-space layers against transformers' classes: tiny random ones, fp32."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from mule.batch import IGNORE, Batch
from mule.errors import ModelError
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.models.families import family
from mule.models.folder import load_model, model_state, read_config, save_model
from mule.models.stored import Names
from tests.parity.tiny_pairs import SHAPE, token_ids
from tests.tiny_mamba import ALL, HYBRID1, HYBRID2, PURE1, PURE2, loud_model

_GRANITE: dict[str, Any] = dict(
    num_key_value_heads=2,
    shared_intermediate_size=56,
    num_local_experts=0,
    num_experts_per_tok=0,
    layer_types=["mamba", "attention", "mamba"],
    mamba_n_heads=12,
    mamba_d_head=8,
    mamba_d_state=16,
    mamba_chunk_size=32,
    attention_multiplier=0.2,
    embedding_multiplier=3.0,
    residual_multiplier=0.4,
    logits_scaling=0.5,
)
_JAMBA: dict[str, Any] = dict(
    num_key_value_heads=2,
    num_experts=1,
    num_experts_per_tok=1,
    attn_layer_period=2,
    attn_layer_offset=1,
    mamba_d_state=6,
    mamba_dt_rank=5,
)
# Name -> transformers' config, which makes the model.
CASES: dict[str, Any] = {
    "granite": transformers.GraniteMoeHybridConfig(**SHAPE | _GRANITE | {"head_dim": 10}),
    "granite-groups-rope": transformers.GraniteMoeHybridConfig(
        **SHAPE
        | _GRANITE
        | dict(mamba_n_groups=3, position_embedding_type="rope", tie_word_embeddings=True)
        | dict(mamba_conv_bias=False, mamba_proj_bias=True, attention_bias=True)
    ),
    "granite-experts": transformers.GraniteMoeHybridConfig(
        **SHAPE | _GRANITE | dict(num_local_experts=5, num_experts_per_tok=2, intermediate_size=24)
    ),
    "granite-attention": transformers.GraniteMoeHybridConfig(
        **SHAPE | _GRANITE | dict(layer_types=["attention"] * 3, position_embedding_type="rope")
    ),
    "jamba": transformers.JambaConfig(**SHAPE | _JAMBA),
    "jamba-experts": transformers.JambaConfig(
        **SHAPE
        | _JAMBA
        | dict(num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1)
        | dict(mamba_conv_bias=False, mamba_proj_bias=True, num_hidden_layers=4)
    ),
}


def pair(case: str, folder: Path) -> tuple[Any, Decoder]:
    """The transformers model of a case, written to `folder`, and ours that reads it."""
    torch.manual_seed(5)
    reference = transformers.AutoModelForCausalLM.from_config(CASES[case]).float().eval()
    for name, parameter in reference.named_parameters():
        if parameter.dim() == 1:  # steps that remember, and norms that are not 1
            low, high = (-4.0, 0.0) if name.endswith("bias") else (0.5, 1.5)
            torch.nn.init.uniform_(parameter, low, high)
    reference.save_pretrained(folder)
    return reference, load_model(folder)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_cached_greedy_text_equal(case: str, tmp_path: Path) -> None:
    reference, ours = pair(case, tmp_path)
    for length in (7, 70):
        ids = token_ids(2, length)
        theirs = reference(ids, use_cache=False).logits
        torch.testing.assert_close(ours(ids), theirs, atol=1e-4, rtol=0)
        assert theirs.std() > 0.1
    ids = token_ids(1, 9, seed=2)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = reference.generate(ids, max_new_tokens=40, **settings)[0, 9:]
    cache, text = ours.new_cache(1, 64), ids
    logits = ours.step(ids, cache)
    for token in wanted.tolist():
        torch.testing.assert_close(logits, ours(text)[:, -1], atol=1e-4, rtol=0)
        assert logits.argmax(-1).item() == token
        text = torch.cat((text, torch.tensor([[token]])), dim=1)
        logits = ours.step(text[:, -1:], cache)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_our_folder_opens_in_transformers(case: str, tmp_path: Path) -> None:
    reference, ours = pair(case, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_model(model_state(ours), ours.config, tmp_path / "ours", extra={"eos_token_id": 3})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    )
    assert type(theirs) is type(reference)
    ids = token_ids(1, 23, seed=3)
    torch.testing.assert_close(theirs(ids).logits, reference(ids).logits, atol=1e-6, rtol=0)
    assert read_config(tmp_path / "ours") == ours.config
    assert cost.total_params(ours.config) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("config", [PURE2, PURE1])
@torch.no_grad()
def test_a_model_without_attention_opens_in_transformers(
    config: ModelConfig, tmp_path: Path
) -> None:
    """Its null layer gives transformers a cache, and changes no bit of what it computes."""
    ours = loud_model(config)
    save_model(model_state(ours), ours.config, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(3, 89, (1, 37))
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = theirs.generate(ids, max_new_tokens=12, **settings)
    assert torch.equal(ours(text)[:, 36:-1].argmax(-1), text[:, 37:])
    whole = theirs(ids).logits
    del theirs.model.layers[3]
    assert torch.equal(theirs(ids, use_cache=False).logits, whole)


@pytest.mark.parametrize("case", ["granite-groups-rope", "jamba"])
def test_gradients_equal(case: str, tmp_path: Path) -> None:
    reference, ours = pair(case, tmp_path)
    ids = token_ids(2, 31)
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORE
    logits = reference(ids, use_cache=False).logits
    theirs = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    theirs.backward()
    positions = torch.arange(31).expand(2, 31)
    loss = ours.nll_sum(Batch(ids, targets, positions, torch.ones_like(ids), isolated=False))
    loss.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0)
    names, wanted = Names(ours.config), dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        (stored,) = names.parts(name)
        gradient = wanted[stored].grad
        assert parameter.grad is not None and gradient is not None
        assert (parameter.grad - gradient).norm() <= 2e-5 * gradient.norm(), name


@pytest.mark.parametrize("name", ALL)
def test_the_config_survives_both_ways(name: str) -> None:
    config = ALL[name]
    raw = family(config.family).to_hf(config)
    assert family(config.family).from_hf(raw) == config
    assert set(raw.get("layer_types", ["mamba"])) <= {"mamba", "attention"}  # as llama.cpp reads it


def with_moe(config: ModelConfig, **fields: Any) -> ModelConfig:
    from mule.models.config import MoEConfig

    moe = MoEConfig(4, 2, config.intermediate_size, **fields)
    return dataclasses.replace(config, moe=moe)


@pytest.mark.parametrize(
    "config, message",
    [
        (with_moe(HYBRID2), "one that all tokens share"),
        (dataclasses.replace(HYBRID2, nope_layers=(0, 1)), "in all of its attention layers, or"),
        (dataclasses.replace(HYBRID2, mamba=PURE1.mamba), "has Mamba-2 blocks of a multiple of"),
        (dataclasses.replace(HYBRID1, mamba=PURE2.mamba), "has Mamba-1 blocks of a multiple of"),
        (dataclasses.replace(HYBRID1, nope_layers=()), "jamba has no rotary positions"),
        (with_moe(HYBRID1), "does not renormalise"),
        (
            dataclasses.replace(HYBRID1, num_layers=5, mamba_layers=(0, 2), nope_layers=(1, 3, 4)),
            "cannot have its attn_layers at blocks",
        ),
    ],
)
def test_what_the_files_cannot_say_is_an_error(config: ModelConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        family(config.family).to_hf(config)


@pytest.mark.parametrize(
    "config, change, message",
    [
        (HYBRID2, {"layer_types": ["mamba", "conv", "mamba"]}, "sets layer_types"),
        (PURE2, {"layer_types": ["mamba", "attention", "mamba", "attention"]}, "sets layer_types"),
        (HYBRID2, {"mamba_n_heads": 9}, "9 Mamba heads of 6 in 2 groups"),
        (HYBRID2, {"mamba_d_state": "16"}, "not a whole number above 0"),
        (HYBRID2, {"num_local_experts": -1}, "not a whole number"),
        (HYBRID2, {"time_step_limit": [0.001, 0.1]}, "which Mule does not compute"),
        (PURE1, {"attn_layer_offset": 1}, "has a null_attention_layer and attention in blocks"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(
    config: ModelConfig, change: dict[str, Any], message: str
) -> None:
    of = family(config.family)
    with pytest.raises(ModelError, match=message):
        of.from_hf(of.to_hf(config) | change)
