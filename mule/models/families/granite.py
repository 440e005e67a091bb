"""Granite 3 (transformers `GraniteForCausalLM`): Llama with four multipliers."""

from __future__ import annotations

from typing import Any

from mule.models.config import ModelConfig
from mule.models.families._dense import biases, checked, dense_from_hf, dense_to_hf
from mule.models.families._granite import MULTIPLIERS, multipliers_from_hf, multipliers_to_hf


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    reads = " ".join(("attention_bias mlp_bias", *MULTIPLIERS))
    raw = checked(raw, defaults=dict.fromkeys(MULTIPLIERS, 1.0), reads=reads)
    return dense_from_hf(raw, **biases(raw), **multipliers_from_hf(raw))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    raw = dense_to_hf(config, "GraniteForCausalLM") | {"mlp_bias": config.mlp_bias}
    return raw | multipliers_to_hf(config)
