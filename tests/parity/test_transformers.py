"""Our decoder against the transformers class of the same name: tiny random models, fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from mule.models.cache import KVCache
from mule.models.folder import load_model, model_state, read_config, save_model

SHAPE = dict(
    vocab_size=211,
    hidden_size=48,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=6,
    head_dim=10,
    max_position_embeddings=192,
    rms_norm_eps=1e-5,
)
CASES = [
    ("llama", dict(num_key_value_heads=6, tie_word_embeddings=False)),
    ("llama", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    ("llama", dict(num_key_value_heads=1, tie_word_embeddings=False)),
    ("qwen3", dict(num_key_value_heads=3, tie_word_embeddings=True)),
    ("qwen3", dict(num_key_value_heads=2, tie_word_embeddings=False)),
]
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def reference_model(family: str, changes: dict) -> transformers.PreTrainedModel:
    config_class, model_class = CLASSES[family]
    torch.manual_seed(5)
    config = config_class(
        **SHAPE, **changes, rope_parameters={"rope_type": "default", "rope_theta": 777.0}
    )
    model = model_class(config).eval()
    for parameter in model.parameters():  # norms of 1 would hide a swapped norm
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-kv{case[1]['num_key_value_heads']}")
def pair(request, tmp_path: Path):
    reference = reference_model(*request.param)
    reference.save_pretrained(tmp_path)
    return reference, load_model(tmp_path), tmp_path


@torch.no_grad()
def test_logits_equal(pair) -> None:
    reference, ours, _ = pair
    ids = torch.randint(0, 211, (2, 37), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(ids), reference(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_text_and_cached_decode_equal(pair) -> None:
    reference, ours, _ = pair
    ids = torch.randint(0, 211, (1, 9), generator=torch.Generator().manual_seed(2))
    expected = reference.generate(ids, max_new_tokens=90, do_sample=False, eos_token_id=None)[0, 9:]
    cache = KVCache(ours.config, 1, 128, ours.lm_head.weight)
    logits = ours.step(ids, cache)
    text = ids
    for wanted in expected.tolist():
        torch.testing.assert_close(logits, ours(text)[:, -1], atol=1e-4, rtol=0)
        token = logits.argmax(-1, keepdim=True)
        assert token.item() == wanted
        text = torch.cat((text, token), dim=1)
        logits = ours.step(token, cache)


@torch.no_grad()
def test_our_folder_opens_in_transformers(pair, tmp_path: Path) -> None:
    reference, ours, _ = pair
    save_model(model_state(ours), ours.config, tmp_path, extra={"eos_token_id": 3})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 211, (1, 23), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(theirs(ids).logits, reference(ids).logits, atol=1e-6, rtol=0)
    assert theirs.generation_config.eos_token_id == 3


def test_both_rope_spellings_are_read(pair) -> None:
    _, ours, folder = pair
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    assert raw["rope_parameters"]["rope_theta"] == ours.config.rope_theta == 777.0
    raw.pop("rope_parameters")
    raw["rope_theta"] = 999.0
    file.write_text(json.dumps(raw))
    assert read_config(folder).rope_theta == 999.0
