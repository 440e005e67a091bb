"""One file per transformers `model_type`: its config.json to ours and back.

Adding a family is adding a file with `from_hf`, `to_hf` and naming it in SUPPORTED (docs/families.md).
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from mule.errors import ModelError
from mule.models.config import ModelConfig

SUPPORTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "smollm3",
    "phi3",
    "granite",
    "qwen3_moe",
    "granitemoeshared",
    "granitemoehybrid",
    "jamba",
)
# Known, and why not: what a person may do about it.
_REFUSED = {
    "gemma3": (
        "reads images too (Gemma 3 of 4B and more), and Mule computes text only",
        "use google/gemma-3-1b-it or google/gemma-3-270m-it, or a text-only copy of this model, "
        "whose config.json says gemma3_text",
    ),
}


class Family(Protocol):
    """What a family file provides."""

    def from_hf(self, raw: dict[str, Any]) -> ModelConfig: ...
    def to_hf(self, config: ModelConfig) -> dict[str, Any]: ...


def family(model_type: str) -> Family:
    """The family file for `model_type`; ModelError lists the supported ones."""
    if model_type in _REFUSED:
        why, hint = _REFUSED[model_type]
        raise ModelError(f"model_type {model_type!r} {why}", hint)
    if model_type not in SUPPORTED:
        raise ModelError(
            f"model_type {model_type!r} is not a family that Mule knows",
            f"use a model of one of these: {', '.join(SUPPORTED)}",
        )
    return cast(Family, importlib.import_module(f"mule.models.families.{model_type}"))
