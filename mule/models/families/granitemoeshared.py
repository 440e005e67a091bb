"""Granite with experts and one that all tokens share (transformers `GraniteMoeSharedForCausalLM`).

The router's weights are a softmax over the chosen experts: renormalised ones.
"""

from __future__ import annotations

from typing import Any

from mule.errors import ModelError
from mule.models.config import ModelConfig, MoEConfig
from mule.models.families import _granite
from mule.models.families._dense import checked, dense_from_hf, dense_to_hf

_DEFAULTS = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 0,
} | dict.fromkeys(_granite.MULTIPLIERS, 1.0)
_READS = " ".join(("attention_bias output_router_logits router_aux_loss_coef", *_DEFAULTS))


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    raw = checked(raw, defaults=_DEFAULTS, reads=_READS)
    bias = bool(raw.get("attention_bias"))
    moe = MoEConfig(
        num_experts=raw["num_local_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        intermediate_size=raw.get("intermediate_size", 0),
        shared_intermediate_size=raw["shared_intermediate_size"],
    )
    return dense_from_hf(
        raw, **_granite.multipliers_from_hf(raw), qkv_bias=bias, o_bias=bias, moe=moe
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None or moe.layers is not None or not moe.renormalize:
        raise ModelError(
            "every block of granitemoeshared has experts, and their weights add up to 1",
            "set model.family=qwen3_moe for experts in some blocks, or for weights as they come",
        )
    raw = dense_to_hf(config, "GraniteMoeSharedForCausalLM") | _granite.multipliers_to_hf(config)
    return raw | {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "shared_intermediate_size": moe.shared_intermediate_size,
    }


def stored_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The names in files that are not those of our modules."""
    names: dict[str, tuple[str, ...]] = {}
    for layer in range(config.num_layers):
        names |= _granite.stored_mlp_names(config, layer)
    return names
