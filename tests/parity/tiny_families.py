"""A tiny transformers model of each family that Mule exports, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mule.tokenizer import Tokenizer
from tests.parity.tiny_gguf import VOCAB_ROWS, tiny_tokenizer

_ORIGINAL_CONTEXT = 64  # of the scaled rotary positions: shorter than the texts compared
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_ROWS,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
}
_HALF_HEAD = 16  # pairs of channels of a head of 32


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 20_000.0} | more}


LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=_ORIGINAL_CONTEXT,
)
LINEAR = _rope("linear", factor=4.0)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=_ORIGINAL_CONTEXT)
YARN_BY_HAND = _rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=_ORIGINAL_CONTEXT,
    attention_factor=0.9,
    beta_fast=32.0,
)


def longrope(original: int, pairs: int = _HALF_HEAD, **more: Any) -> dict[str, Any]:
    """Factors short up to `original` tokens and long beyond."""
    return _rope(
        "longrope",
        short_factor=[1.0 + 0.05 * pair for pair in range(pairs)],
        long_factor=[1.5 + 0.5 * pair for pair in range(pairs)],
        original_max_position_embeddings=original,
        **more,
    )


_GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24}
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 9.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.11,
    "logits_scaling": 3.0,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 160,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
}
_JAMBA: dict[str, Any] = {
    "num_hidden_layers": 3,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 32,
    "num_experts": 1,
    "num_experts_per_tok": 1,
}
NULL_LAYER = 2  # of the models that llama.cpp needs one of, behind the layers that do something
_NO_ATTENTION = ["linear_attention"] * NULL_LAYER + ["full_attention"]
# Name -> model_type and what its config.json says beside the sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 64, "tie_word_embeddings": True}),
    "llama, llama3": ("llama", LLAMA3),
    "llama, linear": ("llama", LINEAR),
    "llama, yarn": ("llama", YARN),
    "llama, longrope": ("llama", {"max_position_embeddings": 2048} | longrope(512)),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 48}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2, yarn": ("qwen2", YARN_BY_HAND),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "qwen3, yarn": ("qwen3", {"head_dim": 32} | YARN),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7} | _GEMMA),
    "gemma3, linear": (
        "gemma3_text",
        _GEMMA
        | {
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3_000.0},
            },
        },
    ),
    "gemma3, no window": (
        "gemma3_text",
        _GEMMA
        | {
            "layer_types": ["full_attention"] * 2,
            "final_logit_softcapping": 7.0,
            "rope_parameters": {
                "full_attention": YARN["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "smollm3, yarn": ("smollm3", {"num_hidden_layers": 4} | YARN),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, partial": ("phi3", _rope("default", partial_rotary_factor=0.5)),
    "phi3, short": (
        "phi3",
        {"original_max_position_embeddings": 512, "max_position_embeddings": 2048}
        | longrope(512, pairs=12, partial_rotary_factor=0.75),
    ),
    "phi3, long": (
        "phi3",
        {"original_max_position_embeddings": _ORIGINAL_CONTEXT} | longrope(_ORIGINAL_CONTEXT),
    ),
    "granite": ("granite", _GRANITE | {"tie_word_embeddings": True}),
    "granite, llama3": ("granite", _GRANITE | {"attention_bias": True} | LLAMA3),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "head_dim": 64,
        },
    ),
    "granitemoeshared": (
        "granitemoeshared",
        _GRANITE | _EXPERTS | {"shared_intermediate_size": 160, "tie_word_embeddings": True},
    ),
    "hybrid": ("granitemoehybrid", _GRANITE | _HYBRID),
    "hybrid, groups and RoPE": (
        "granitemoehybrid",
        _HYBRID | {"mamba_n_groups": 2, "position_embedding_type": "rope"},
    ),
    "hybrid, experts": ("granitemoehybrid", _GRANITE | _HYBRID | _EXPERTS),
    "hybrid, no attention": (
        "granitemoehybrid",
        _HYBRID | {"layer_types": _NO_ATTENTION, "num_key_value_heads": 1},
    ),
    "jamba": ("jamba", _JAMBA),
    "jamba, experts": ("jamba", _JAMBA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "jamba, no attention": (
        "jamba",
        _JAMBA | {"attn_layer_offset": NULL_LAYER, "num_key_value_heads": 1},
    ),
}


def save_family(folder: Path, name: str, tokenizer: Tokenizer | None = None, **more: Any) -> Any:
    """Save the model of MODELS called `name` with a tokenizer; returns it, in fp32."""
    torch.manual_seed(len(name))
    kind, changes = MODELS[name]
    tokenizer = tokenizer or tiny_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": None, "bos_token_id": None}
    config = AutoConfig.for_model(kind, **(_SIZES | changes | ids | more))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases off their trivial values
                parameter.add_(0.2 * torch.randn_like(parameter))
        if "no attention" in name:
            for parameter in model.model.layers[NULL_LAYER].parameters():
                parameter.zero_()
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model
