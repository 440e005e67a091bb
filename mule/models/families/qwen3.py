"""Qwen3 (transformers `Qwen3ForCausalLM`): Llama with an RMSNorm on every query and key head."""

from __future__ import annotations

from typing import Any

from mule.models.config import ModelConfig
from mule.models.families._dense import dense_from_hf, dense_to_hf


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    return dense_from_hf(raw, qk_norm=True)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return dense_to_hf(config, "Qwen3ForCausalLM") | {"use_sliding_window": False}
