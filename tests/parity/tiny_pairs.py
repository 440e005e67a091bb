"""Tiny random models of transformers' own classes, one for each family and variant, and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from mule.models.decoder import Decoder
from mule.models.folder import load_model

VOCAB = 211
DEFAULT = {"rope_type": "default", "rope_theta": 777.0}
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=192,
    rms_norm_eps=1e-5,
    initializer_range=0.1,  # at 0.02 attention is nearly flat, and a wrong mask goes unseen
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# Texts beyond 40 tokens take the long factors; 8 channels of a head turn.
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 777.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.3, 1.6, 1.9],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}


def _qwen_window(first: int) -> dict[str, Any]:
    return dict(use_sliding_window=True, sliding_window=9, max_window_layers=first)


def _gemma(window: bool, full: dict[str, Any], **more: Any) -> dict[str, Any]:
    rope = {"full_attention": full | {"rope_theta": 9e3}, "sliding_attention": dict(DEFAULT)}
    first = "sliding_attention" if window else "full_attention"
    types = [first, "full_attention", first]
    return dict(layer_types=types, rope_parameters=rope, head_dim=12, **more)


# name -> family, what its config sets beyond SHAPE
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", dict(num_key_value_heads=6, head_dim=10)),
    "llama-gqa": ("llama", dict(num_key_value_heads=2, head_dim=10, tie_word_embeddings=True)),
    "llama-mqa": ("llama", dict(num_key_value_heads=1, head_dim=10)),
    "llama-bias": ("llama", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", dict(num_key_value_heads=2, head_dim=10, sliding_window=None)),
    "mistral-window": ("mistral", dict(num_key_value_heads=3, head_dim=8, sliding_window=11)),
    "qwen2": ("qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2-window": ("qwen2", dict(num_key_value_heads=2) | _qwen_window(1)),
    "qwen3": ("qwen3", dict(num_key_value_heads=3, head_dim=10, tie_word_embeddings=True)),
    "qwen3-window": (
        "qwen3",
        dict(num_key_value_heads=2, head_dim=10, attention_bias=True) | _qwen_window(2),
    ),
    "gemma3": (
        "gemma3_text",
        _gemma(
            True,
            {"rope_type": "linear", "factor": 8.0},
            num_key_value_heads=1,
            query_pre_attn_scalar=20,
            sliding_window=8,
        ),
    ),
    "gemma3-rnj": (
        "gemma3_text",
        _gemma(
            False,
            dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=48, beta_fast=64.0),
            num_key_value_heads=2,
            query_pre_attn_scalar=12,
            final_logit_softcapping=3.0,
        ),
    ),
    "smollm3": ("smollm3", dict(num_key_value_heads=2, num_hidden_layers=5)),
    "smollm3-window": (
        "smollm3",
        dict(
            num_key_value_heads=2,
            no_rope_layers=[0, 1, 0],
            use_sliding_window=True,
            sliding_window=10,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "phi3": ("phi3", dict(num_key_value_heads=6, sliding_window=10)),
    "phi3-long": (
        "phi3",
        dict(
            num_key_value_heads=2,
            hidden_size=96,
            original_max_position_embeddings=40,
            rope_parameters=LONGROPE,
            tie_word_embeddings=True,
        ),
    ),
    "granite": (
        "granite",
        dict(
            num_key_value_heads=2,
            embedding_multiplier=6.0,
            residual_multiplier=0.22,
            attention_multiplier=0.2,
            logits_scaling=3.0,
            tie_word_embeddings=True,
        ),
    ),
    "granite-bias": (
        "granite",
        dict(num_key_value_heads=3, attention_bias=True, mlp_bias=True, logits_scaling=0.5),
    ),
    "qwen3-moe": (
        "qwen3_moe",
        dict(
            num_key_value_heads=2,
            head_dim=10,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=28,
            norm_topk_prob=True,
        ),
    ),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        dict(
            num_key_value_heads=3,
            num_hidden_layers=5,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            use_sliding_window=True,
            sliding_window=9,
            tie_word_embeddings=True,
        ),
    ),
    "granite-moe": (
        "granitemoeshared",
        dict(
            num_key_value_heads=2,
            intermediate_size=28,
            shared_intermediate_size=36,
            num_local_experts=5,
            num_experts_per_tok=2,
            embedding_multiplier=6.0,
            residual_multiplier=0.22,
            attention_multiplier=0.2,
            logits_scaling=3.0,
            tie_word_embeddings=True,
        ),
    ),
    "granite-moe-unshared": (
        "granitemoeshared",
        dict(
            num_key_value_heads=3,
            intermediate_size=20,
            shared_intermediate_size=0,
            num_local_experts=7,
            num_experts_per_tok=3,
            attention_bias=True,
        ),
    ),
}
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "granitemoeshared": (
        transformers.GraniteMoeSharedConfig,
        transformers.GraniteMoeSharedForCausalLM,
    ),
}


def reference_model(case: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of the transformers class; its norms and biases are random too."""
    family, settings = CASES[case]
    config_class, model_class = CLASSES[family]
    torch.manual_seed(5)
    rope = {"rope_parameters": dict(DEFAULT)}
    model = model_class(config_class(**(SHAPE | rope | settings | changes))).eval()
    around = 0.0 if family == "gemma3_text" else 1.0  # there a norm multiplies by 1 + weight
    for name, parameter in model.named_parameters():  # norms of 1 would hide a swapped norm
        if parameter.dim() == 1:
            middle = 0.0 if name.endswith(".bias") else around
            torch.nn.init.uniform_(parameter, middle - 0.5, middle + 0.5)
    return model


def tiny_pair(
    folder: Path, case: str, **changes: Any
) -> tuple[transformers.PreTrainedModel, Decoder]:
    """The transformers model of a case, written to `folder`, and ours that reads it."""
    reference = reference_model(case, **changes)
    reference.save_pretrained(folder)
    return reference, load_model(folder)


def token_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
