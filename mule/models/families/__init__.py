"""One file per transformers `model_type`: its config.json to ours and back.

Adding a family is adding a file with `from_hf`, `to_hf` and naming it in SUPPORTED.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from mule.errors import ModelError
from mule.models.config import ModelConfig

SUPPORTED = ("llama", "qwen3")


class Family(Protocol):
    """What a family file provides."""

    def from_hf(self, raw: dict[str, Any]) -> ModelConfig: ...
    def to_hf(self, config: ModelConfig) -> dict[str, Any]: ...


def family(model_type: str) -> Family:
    """The family file for `model_type`; ModelError lists the supported ones."""
    if model_type not in SUPPORTED:
        raise ModelError(
            f"model_type {model_type!r} is not a family that Mule knows",
            f"use a model of one of these: {', '.join(SUPPORTED)}",
        )
    return cast(Family, importlib.import_module(f"mule.models.families.{model_type}"))
