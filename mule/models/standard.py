"""What a new model of a family has where nothing else is asked for. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mule.errors import ModelError
from mule.models.config import MambaConfig

GRANITE = ("granitemoeshared", "granitemoehybrid")
_QK_NORM = ("qwen3", "qwen3_moe")


def family_fields(family: str, head_dim: int) -> dict[str, Any]:
    """The fields of a ModelConfig that the family alone decides."""
    scale = head_dim**-0.5 if family in GRANITE else None  # their files always say it
    return {"qk_norm": family in _QK_NORM, "attention_scale": scale}


def null_heads(family: str, hidden_size: int) -> dict[str, int]:
    """The heads that a ModelConfig without attention names: those of the layer of zeros in its files
    (families/_null.py), few, but for Jamba's, whose heads other programs take to fill the stream."""
    if family == "jamba":
        width = 64 if hidden_size % 64 == 0 else hidden_size
        return {"num_heads": hidden_size // width, "num_kv_heads": 1, "head_dim": width}
    return {"num_heads": 4 if hidden_size >= 256 else 1, "num_kv_heads": 1, "head_dim": 64}


def mamba_layers(num_layers: int, attention_every: int | None) -> tuple[int, ...]:
    """The blocks that do not attend: all but every so many-th."""
    if attention_every is not None and attention_every > num_layers:
        raise ModelError(
            f"every {attention_every}th block is to attend, but there are {num_layers} blocks",
            "lower attention_every; or remove it, so that no block attends",
        )
    return tuple(
        i for i in range(num_layers) if attention_every is None or (i + 1) % attention_every
    )


def mamba_config(
    kind: Literal["mamba1", "mamba2"], hidden_size: int, given: Mapping[str, int]
) -> MambaConfig:
    """A state-space layer twice as wide as the residual stream, but for the fields `given`.

    Source: the defaults of the mamba_ssm package's `Mamba` and `Mamba2`, with heads of 64 channels.
    """
    standard: dict[str, Any]
    if kind == "mamba1":
        standard = {
            "state_size": 16,
            "num_heads": 2 * hidden_size,
            "dt_rank": -(-hidden_size // 16),
        }
    else:
        width = given.get("head_dim", 64)
        standard = {
            "state_size": 128,
            "num_heads": 2 * hidden_size // width,
            "head_dim": width,
        }
    standard.update(given)
    made = MambaConfig(kind, **standard, inner_norms=kind == "mamba1")
    if made.inner_size == 0 or made.inner_size % hidden_size:
        raise ModelError(
            f"model.mamba has {made.num_heads} heads of {made.head_dim} = {made.inner_size} "
            f"channels, which is no multiple of model.hidden_size = {hidden_size}",
            "change model.mamba.num_heads or model.mamba.head_dim; their product is usually "
            f"{2 * hidden_size}",
        )
    if made.num_heads % made.num_groups:
        raise ModelError(
            f"model.mamba.num_groups = {made.num_groups} does not divide {made.num_heads} heads",
            "choose a divisor; 1 is usual",
        )
    return made
