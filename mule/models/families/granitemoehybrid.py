"""Granite 4 (transformers `GraniteMoeHybridForCausalLM`): Mamba-2 or attention, then a gated MLP, in
every block; with experts the MLP is the one that all tokens share.

Blocks are written as "mamba" and "attention", which transformers 5 reads as its own names and other
programs know. Pure Mamba models have a null layer in their files (families/_null.py).
"""

from __future__ import annotations

import math
from typing import Any

from mule.errors import ModelError
from mule.models.config import MambaConfig, ModelConfig, MoEConfig
from mule.models.families import _granite
from mule.models.families._dense import checked, dense_from_hf, dense_to_hf
from mule.models.families._null import KEY, has_null_layer, null_shapes

_DEFAULTS = {
    "shared_intermediate_size": 1024,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
} | dict.fromkeys(_granite.MULTIPLIERS, 1.0)
_READS = " ".join(
    (
        "attention_bias position_embedding_type layer_types layers_block_type mamba_d_head",
        "output_router_logits router_aux_loss_coef normalization_function",
        KEY,
        *_DEFAULTS,
    )
)
_REQUIRED = {
    "time_step_limit": ([0.0, math.inf], (0.0, math.inf), [0.0, {"__float__": "Infinity"}]),
    "init_method": ("mup",),
}
_IS_MAMBA = {"mamba": True, "linear_attention": True, "attention": False, "full_attention": False}


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    raw = checked(raw, defaults=_DEFAULTS, reads=_READS, required=_REQUIRED)
    has_null = bool(raw.get(KEY))
    if has_null:
        raw = raw | {"num_hidden_layers": raw["num_hidden_layers"] - 1}
    is_mamba = _layers(raw, has_null)
    mamba_layers = tuple(i for i, mamba in enumerate(is_mamba) if mamba)
    attending = tuple(i for i, mamba in enumerate(is_mamba) if not mamba)
    moe = None
    if raw["num_local_experts"]:
        moe = MoEConfig(
            num_experts=raw["num_local_experts"],
            experts_per_token=raw["num_experts_per_tok"],
            intermediate_size=raw["intermediate_size"],
            shared_intermediate_size=raw["shared_intermediate_size"],
        )
    else:
        raw = raw | {"intermediate_size": raw["shared_intermediate_size"]}
    bias = bool(raw.get("attention_bias"))
    return dense_from_hf(
        raw,
        **_granite.multipliers_from_hf(raw),
        qkv_bias=bias,
        o_bias=bias,
        nope_layers=() if raw.get("position_embedding_type") == "rope" else attending,
        moe=moe,
        mamba=_mamba(raw) if mamba_layers else None,
        mamba_layers=mamba_layers,
    )


def _layers(raw: dict[str, Any], has_null: bool) -> list[bool]:
    """Whether each block is one of Mamba."""
    count = raw["num_hidden_layers"]
    types = raw.get("layer_types") or raw.get("layers_block_type") or ["mamba"] * count
    known = len(types) == count + has_null and not set(types) - set(_IS_MAMBA)
    is_mamba = [_IS_MAMBA[kind] for kind in types] if known else []
    if not known or (has_null and (is_mamba.pop() or not all(is_mamba))):
        raise ModelError(
            f"config.json sets layer_types = {types!r}, which does not fit",
            "give each block mamba or attention; a null_attention_layer comes last, behind Mamba only",
        )
    return is_mamba


def _mamba(raw: dict[str, Any]) -> MambaConfig:
    heads, inner = raw["mamba_n_heads"], raw["mamba_expand"] * raw["hidden_size"]
    head_dim = raw.get("mamba_d_head") or "auto"
    head_dim = inner // heads if head_dim == "auto" else head_dim
    if heads * head_dim != inner or heads % raw["mamba_n_groups"]:
        raise ModelError(
            f"config.json has {heads} Mamba heads of {head_dim} in {raw['mamba_n_groups']} groups, "
            f"for {inner} channels",
            "download the model again, or restore the keys",
        )
    return MambaConfig(
        kind="mamba2",
        state_size=raw["mamba_d_state"],
        num_heads=heads,
        head_dim=head_dim,
        num_groups=raw["mamba_n_groups"],
        conv_kernel=raw["mamba_d_conv"],
        chunk_size=raw["mamba_chunk_size"],
        conv_bias=raw["mamba_conv_bias"],
        proj_bias=raw["mamba_proj_bias"],
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    raw = dense_to_hf(config, "GraniteMoeHybridForCausalLM") | _granite.multipliers_to_hf(config)
    moe, has_null = config.moe, has_null_layer(config)
    if moe is not None and (not moe.shared_intermediate_size or moe.layers is not None):
        raise ModelError(
            "every block of granitemoehybrid has its experts and one that all tokens share",
            "set model.moe.shared_intermediate_size to 32 or more",
        )
    kinds = ["mamba" if config.has_mamba(i) else "attention" for i in range(config.num_layers)]
    shared = config.intermediate_size if moe is None else moe.shared_intermediate_size
    raw |= {
        "num_hidden_layers": config.num_layers + has_null,
        "layer_types": kinds + ["attention"] * has_null,
        KEY: has_null,
        "position_embedding_type": _positions(config),
        "shared_intermediate_size": shared,
        "num_local_experts": 0 if moe is None else moe.num_experts,
        "num_experts_per_tok": 0 if moe is None else moe.experts_per_token,
    }
    return raw | _mamba_to_hf(config)


def _positions(config: ModelConfig) -> str | None:
    if set(config.nope_layers) not in (set(), set(config.attention_layers)):
        raise ModelError(
            "granitemoehybrid has rotary positions in all of its attention layers, or in none",
            "set model.position_embedding to rope or none",
        )
    return "rope" if config.attention_layers and not config.nope_layers else None


def _mamba_to_hf(config: ModelConfig) -> dict[str, Any]:
    mamba = config.mamba
    if mamba is None:  # the class computes with its defaults all the same
        return {"mamba_n_heads": config.hidden_size // 2, "mamba_d_head": 4, "mamba_expand": 2}
    if mamba.kind != "mamba2" or mamba.inner_size % config.hidden_size:
        raise ModelError(
            f"granitemoehybrid has Mamba-2 blocks of a multiple of {config.hidden_size} channels, "
            f"not {mamba.kind} of {mamba.inner_size}",
            "change model.mamba.num_heads or model.mamba.head_dim",
        )
    return {
        "mamba_n_heads": mamba.num_heads,
        "mamba_d_head": mamba.head_dim,
        "mamba_n_groups": mamba.num_groups,
        "mamba_d_state": mamba.state_size,
        "mamba_d_conv": mamba.conv_kernel,
        "mamba_expand": mamba.inner_size // config.hidden_size,
        "mamba_chunk_size": mamba.chunk_size,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.proj_bias,
    }


def stored_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The names in files that are not those of our modules."""
    names: dict[str, tuple[str, ...]] = {}
    for layer in range(config.num_layers):
        names |= _granite.stored_mlp_names(config, layer)
    return names


def null_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the null layer's weights, by their names in files; none in a mixed model."""
    hidden, moe = config.hidden_size, config.moe
    width = config.intermediate_size if moe is None else moe.shared_intermediate_size
    mlp: dict[str, tuple[int, ...]] = {
        "shared_mlp.input_linear": (2 * width, hidden),
        "shared_mlp.output_linear": (hidden, width),
    }
    if moe is not None:
        mlp |= {
            "block_sparse_moe.router.layer": (moe.num_experts, hidden),
            "block_sparse_moe.input_linear": (moe.num_experts, 2 * moe.intermediate_size, hidden),
            "block_sparse_moe.output_linear": (moe.num_experts, hidden, moe.intermediate_size),
        }
    return null_shapes(config, "post_attention_layernorm", mlp)
