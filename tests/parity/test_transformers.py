"""Our decoder against the transformers class of the same name: tiny random models, fp32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from mule.batch import IGNORE, Batch
from mule.models import cost
from mule.models.cache import KVCache
from mule.models.decoder import Decoder
from mule.models.families import family
from mule.models.folder import load_model, model_state, read_config, save_model
from mule.models.foreign import expected
from tests.parity.tiny_pairs import CASES, tiny_pair, token_ids


@pytest.fixture(params=CASES)
def pair(request, tmp_path: Path) -> tuple[Any, Decoder, Path]:
    return *tiny_pair(tmp_path, request.param), tmp_path


@torch.no_grad()
def test_logits_equal(pair) -> None:
    reference, ours, _ = pair
    for length in (7, 37, 70):
        ids = token_ids(2, length)
        theirs = reference(ids, use_cache=False).logits
        torch.testing.assert_close(ours(ids), theirs, atol=1e-4, rtol=0)
        assert theirs.std() > 0.1


@torch.no_grad()
def test_greedy_text_and_cached_decode_equal(pair) -> None:
    reference, ours, _ = pair
    ids = token_ids(1, 9, seed=2)
    wanted = reference.generate(
        ids, max_new_tokens=90, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 9:]
    cache = KVCache(ours.config, 1, 128, ours.lm_head.weight)
    logits = ours.step(ids, cache)
    text = ids
    for token in wanted.tolist():
        torch.testing.assert_close(logits, ours(text)[:, -1], atol=1e-4, rtol=0)
        assert logits.argmax(-1).item() == token
        text = torch.cat((text, torch.tensor([[token]])), dim=1)
        logits = ours.step(text[:, -1:], cache)


@torch.no_grad()
def test_our_folder_opens_in_transformers(pair, tmp_path: Path) -> None:
    reference, ours, _ = pair
    save_model(model_state(ours), ours.config, tmp_path, extra={"eos_token_id": 3})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs) is type(reference)
    for length in (23, 70):
        ids = token_ids(1, length, seed=3)
        torch.testing.assert_close(theirs(ids).logits, reference(ids).logits, atol=1e-6, rtol=0)
    assert theirs.generation_config.eos_token_id == 3
    assert read_config(tmp_path) == ours.config


def test_the_config_survives_both_ways_and_counts_what_is_there(pair) -> None:
    _, ours, _ = pair
    config = ours.config
    assert family(config.family).from_hf(family(config.family).to_hf(config)) == config
    assert cost.total_params(config) == sum(p.numel() for p in ours.parameters())
    if config.moe is None and config.mamba is None:  # what mule convert reads
        assert expected(config) == {name: tuple(t.shape) for name, t in model_state(ours).items()}


def test_fresh_weights_norms_and_biases(pair) -> None:
    ours = pair[1]
    ours.init_weights(0)
    for name, parameter in ours.named_parameters():
        if parameter.dim() == 1:
            is_zero = name.endswith(".bias") or ours.config.norm_plus_one
            assert (parameter == (0.0 if is_zero else 1.0)).all(), name


@pytest.mark.parametrize("case", ["llama-bias", "gemma3", "gemma3-rnj", "phi3-long", "granite"])
def test_gradients_equal(case: str, tmp_path: Path) -> None:
    reference, ours = tiny_pair(tmp_path, case)
    ids = token_ids(2, 31)
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORE
    targets[0, :9] = IGNORE
    theirs = F.cross_entropy(
        reference(ids).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    theirs.backward()
    positions = torch.arange(31).expand(2, 31)
    batch = Batch(ids, targets, positions, torch.ones_like(ids), isolated=False)
    loss = ours.nll_sum(batch)
    loss.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours.nll_sum(batch), theirs.detach(), rtol=1e-6, atol=0)
    wanted = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = wanted[name].grad
        assert parameter.grad is not None and gradient is not None
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm(), name


@torch.no_grad()
def test_gemma_in_bf16_rounds_its_scale_and_norms_as_transformers_does(tmp_path: Path) -> None:
    reference, _ = tiny_pair(tmp_path, "gemma3", hidden_size=66)
    ours = load_model(tmp_path, dtype=torch.bfloat16)
    reference = reference.to(torch.bfloat16)
    ids = token_ids(2, 37)
    embedded = ours.model.embed(ids)
    assert torch.equal(embedded, reference.model.embed_tokens(ids))
    block, theirs = ours.model.layers[0], reference.model.layers[0]
    normed = theirs.input_layernorm(embedded)
    # The order of operations inside a norm differs: by one rounding at most.
    torch.testing.assert_close(block.input_layernorm(embedded), normed, rtol=2**-7, atol=0)
    difference = ours(ids).float() - reference(ids).logits.float()
    assert difference.norm() <= 0.02 * reference(ids).logits.float().norm()


def test_both_rope_spellings_are_read(tmp_path: Path) -> None:
    _, ours = tiny_pair(tmp_path, "llama-gqa")
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    assert raw["rope_parameters"]["rope_theta"] == ours.config.rope_theta == 777.0
    raw.pop("rope_parameters")
    raw["rope_theta"] = 999.0
    file.write_text(json.dumps(raw))
    assert read_config(tmp_path).rope_theta == 999.0


def test_a_vocabulary_wider_than_the_tokenizer_is_never_sampled(tmp_path: Path) -> None:
    from mule.generate.engine import stream

    model = tiny_pair(tmp_path, "gemma3")[1]
    with torch.no_grad():
        model.model.embed_tokens.weight[200:] *= 50.0  # rows that no token has, and loud ones
    ids = token_ids(1, 9)[0].clamp_max(199).tolist()
    free = list(stream(model, ids, max_tokens=12, stop_ids=[]))
    held = list(stream(model, ids, max_tokens=12, stop_ids=[], vocab_size=200))
    assert max(free) >= 200 > max(held)


def test_the_models_differ_where_a_setting_does(tmp_path: Path) -> None:
    """What these cases claim to test has an effect on the logits."""
    for case, field, plain in (
        ("mistral-window", "sliding_layers", ()),
        ("gemma3", "rope_local_theta", None),
        ("gemma3-rnj", "logit_softcap", None),
        ("smollm3", "nope_layers", ()),
        ("phi3-long", "rope_scaling", None),
        ("granite", "residual_scale", 1.0),
        ("granite", "logit_scale", 1.0),
        ("granite", "attention_scale", None),
    ):
        model = tiny_pair(tmp_path / f"{case}-{field}", case)[1]
        other = Decoder(dataclasses.replace(model.config, **{field: plain}))
        other.load_state_dict(model.state_dict())
        ids = token_ids(1, 37)
        assert (model(ids) - other(ids)).abs().max() > 1e-2, (case, field)
