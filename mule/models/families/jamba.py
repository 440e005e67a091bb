"""Jamba (transformers `JambaForCausalLM`): Mamba-1 or, every so many blocks, attention without
positions; a gated MLP, or every so many blocks experts. Pure Mamba models have a null layer in their
files (families/_null.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mule.errors import ModelError
from mule.models.config import MambaConfig, ModelConfig, MoEConfig
from mule.models.families._dense import checked, dense_from_hf, dense_to_hf
from mule.models.families._null import KEY, has_null_layer, null_shapes

_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 262_144,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
# The last line is of how transformers computes, or of training.
_READS = f"""{" ".join(_DEFAULTS)} {KEY} mamba_dt_rank
    use_mamba_kernels use_mambapy use_associative_scan output_router_logits router_aux_loss_coef
    num_logits_to_keep calc_logits_for_entire_prompt mamba_inner_layernorms"""
_MLP = ("gate_proj", "up_proj", "down_proj")


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    raw = checked(raw, defaults=_DEFAULTS, reads=_READS)
    count = raw.get("num_hidden_layers", 0)
    attending = _every(raw, "attn_layer", count)
    if raw.get(KEY):
        if attending != (count - 1,):
            raise ModelError(
                f"config.json has a null_attention_layer and attention in blocks {attending!r}",
                "a null layer comes last, behind Mamba only; remove the key, or restore the periods",
            )
        count, attending = count - 1, ()
    mamba_layers = tuple(i for i in range(count) if i not in attending)
    return dense_from_hf(
        raw | {"num_hidden_layers": count},
        nope_layers=attending,
        moe=_experts(raw, count),
        mamba=_mamba(raw) if mamba_layers else None,
        mamba_layers=mamba_layers,
    )


def _every(raw: dict[str, Any], kind: str, count: int) -> tuple[int, ...]:
    """The blocks that a period and an offset name."""
    period, offset = raw[f"{kind}_period"], raw[f"{kind}_offset"]
    return tuple(i for i in range(count) if i % period == offset)


def _experts(raw: dict[str, Any], count: int) -> MoEConfig | None:
    layers = _every(raw, "expert_layer", count)
    if raw["num_experts"] <= 1 or not layers:
        return None
    return MoEConfig(
        num_experts=raw["num_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        intermediate_size=raw.get("intermediate_size", 0),
        renormalize=False,
        layers=None if len(layers) == count else layers,
    )


def _mamba(raw: dict[str, Any]) -> MambaConfig:
    hidden, rank = raw.get("hidden_size", 0), raw.get("mamba_dt_rank") or "auto"
    return MambaConfig(
        kind="mamba1",
        state_size=raw["mamba_d_state"],
        num_heads=raw["mamba_expand"] * hidden,
        conv_kernel=raw["mamba_d_conv"],
        dt_rank=math.ceil(hidden / 16) if rank == "auto" else rank,
        conv_bias=raw["mamba_conv_bias"],
        proj_bias=raw["mamba_proj_bias"],
        inner_norms=True,
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    raw = dense_to_hf(config, "JambaForCausalLM")
    for key in ("rope_theta", "rope_parameters", "attention_bias"):
        raw.pop(key)
    has_null, count = has_null_layer(config), config.num_layers
    if config.nope_layers != config.attention_layers:
        raise ModelError(
            "jamba has no rotary positions, and this model has",
            "use granitemoehybrid with model.position_embedding=rope",
        )
    attending = (count,) if has_null else config.attention_layers
    raw |= _period("attn_layer", attending, count + has_null)
    moe = config.moe
    if moe is not None:
        if moe.renormalize or moe.intermediate_size != config.intermediate_size:
            raise ModelError(
                "jamba does not renormalise its routers' weights, and its experts are as wide as its "
                "other feed-forward layers",
                "use granitemoehybrid for a new model with experts",
            )
        raw |= _period("expert_layer", moe.layers or range(count), count)
    raw |= {
        "num_hidden_layers": count + has_null,
        KEY: has_null,
        "num_experts": 1 if moe is None else moe.num_experts,
        "num_experts_per_tok": 1 if moe is None else moe.experts_per_token,
    }
    return raw | _mamba_to_hf(config)


def _period(kind: str, layers: Sequence[int], count: int) -> dict[str, int]:
    """The period and the offset of some of `count` blocks."""
    offset = layers[0] if layers else 0
    period = layers[1] - offset if len(layers) > 1 else count
    if tuple(layers) != tuple(range(offset, count, period)) or offset >= period:
        raise ModelError(
            f"jamba cannot have its {kind}s at blocks {tuple(layers)!r} of {count}",
            "choose every so many-th block, beginning within the first period",
        )
    return {f"{kind}_period": period, f"{kind}_offset": offset}


def _mamba_to_hf(config: ModelConfig) -> dict[str, Any]:
    mamba = config.mamba
    if mamba is None or mamba.kind != "mamba1" or mamba.inner_size % config.hidden_size:
        raise ModelError(
            f"jamba has Mamba-1 blocks of a multiple of {config.hidden_size} channels",
            "set model.mamba.kind=mamba1, and model.mamba.num_heads to such a multiple",
        )
    return {
        "mamba_d_state": mamba.state_size,
        "mamba_d_conv": mamba.conv_kernel,
        "mamba_expand": mamba.inner_size // config.hidden_size,
        "mamba_dt_rank": mamba.dt_rank,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.proj_bias,
    }


def stored_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The names in files that are not those of our modules."""
    names: dict[str, tuple[str, ...]] = {"model.norm.weight": ("model.final_layernorm.weight",)}
    for layer in range(config.num_layers):
        start = f"model.layers.{layer}"
        names[f"{start}.post_attention_layernorm.weight"] = (f"{start}.pre_ff_layernorm.weight",)
        names |= dict(_stored_mlp(config, layer, f"{start}.mlp", f"{start}.feed_forward"))
    return names


def _stored_mlp(
    config: ModelConfig, layer: int, ours: str, theirs: str
) -> Iterator[tuple[str, tuple[str, ...]]]:
    if config.moe is None or not config.has_experts(layer):
        for name in _MLP:
            yield f"{ours}.{name}.weight", (f"{theirs}.{name}.weight",)
        return
    each = [f"{theirs}.experts.{expert}" for expert in range(config.moe.num_experts)]
    gate_up = (f"{one}.{name}.weight" for one in each for name in _MLP[:2])
    yield f"{ours}.gate.weight", (f"{theirs}.router.weight",)
    yield f"{ours}.experts.gate_up_proj", tuple(gate_up)
    yield f"{ours}.experts.down_proj", tuple(f"{one}.down_proj.weight" for one in each)


def null_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the null layer's weights, by their names in files; none in a mixed model."""
    hidden, width = config.hidden_size, config.intermediate_size
    shapes = {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    mlp: dict[str, tuple[int, ...]] = {f"feed_forward.{name}": shapes[name] for name in _MLP}
    if has_null_layer(config) and (moe := config.moe) is not None:
        expert_layers = moe.layers or range(config.num_layers)
        period = _period("expert_layer", expert_layers, config.num_layers)
        if config.num_layers % period["expert_layer_period"] == period["expert_layer_offset"]:
            mlp = {
                f"feed_forward.experts.{expert}.{name}": shapes[name]
                for expert in range(moe.num_experts)
                for name in _MLP
            }
            mlp["feed_forward.router"] = (moe.num_experts, hidden)
    return null_shapes(config, "pre_ff_layernorm", mlp)
