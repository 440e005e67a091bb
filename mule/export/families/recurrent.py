"""Families with state-space layers: Granite 4's hybrid (Mamba-2) and Jamba (Mamba-1)."""

from __future__ import annotations

import math
from typing import Any

from gguf.constants import MODEL_ARCH, Keys

from mule.export.families.experts import (
    expert_stacks,
    expert_words,
    granite_expert_fields,
    granite_expert_keys,
    granite_expert_stacks,
    granite_experts,
    granite_shared,
    granite_shared_stacks,
)
from mule.export.families.shape import (
    ALL_SCALINGS,
    ATTENTION,
    NORMS,
    SILU,
    Experts,
    Family,
    ModelShape,
    Part,
    Recurrence,
    Stack,
    Words,
    granite_scales,
)

_RECURRENT = frozenset({"mamba", "linear_attention"})  # transformers' old and new word for one
_JAMBA_RANK = 16  # channels for each number of the time step's rank, where config.json has none


def _whole(source: str, count: int, *shape: int) -> Stack:
    """A weight that the file has in another shape."""
    return Stack((Part(source, 0, count),), shape)


def _checked(raw: dict[str, Any], ssm: Recurrence) -> Recurrence:
    """ValueError for layers that llama.cpp cannot compute, or cannot run without."""
    if not ssm.layers:
        raise ValueError("no layer is a Mamba one: it is no hybrid model")
    if len(ssm.layers) == raw["num_hidden_layers"]:
        raise ValueError(
            "every layer is a Mamba one, and llama.cpp stops at the first token of a model without "
            "attention; Mule saves such a model with a layer of zeros behind the last"
        )
    if ssm.inner != 2 * raw["hidden_size"]:
        raise ValueError(
            f"{ssm.inner} channels in its Mamba layers; llama.cpp computes twice the hidden size, "
            f"{2 * raw['hidden_size']}"
        )
    if not raw.get("mamba_conv_bias", True):
        raise ValueError("mamba_conv_bias = False, and llama.cpp adds one")
    return ssm


# ---------------------------------------------------------------- Granite 4 hybrid


def _granite(raw: dict[str, Any]) -> dict[str, Any]:
    kinds = raw.get("layer_types") or ["mamba"] * raw["num_hidden_layers"]
    heads, low, high = raw["mamba_n_heads"], *_step_limit(raw)
    if (low, high) != (0.0, math.inf):
        raise ValueError(f"time_step_limit = [{low:g}, {high:g}], and llama.cpp has no limits")
    ssm = Recurrence(
        layers=frozenset(layer for layer, kind in enumerate(kinds) if kind in _RECURRENT),
        inner=int(raw["mamba_expand"] * raw["hidden_size"]),
        state=raw["mamba_d_state"],
        steps=heads,
        conv_kernel=raw["mamba_d_conv"],
        groups=raw["mamba_n_groups"],
    )
    found: dict[str, Any] = {"ssm": _checked(raw, ssm)}
    if raw.get("num_local_experts"):
        return found | {"experts": granite_expert_fields(raw)}
    return found | {"ffn": raw["shared_intermediate_size"]}


def _step_limit(raw: dict[str, Any]) -> tuple[float, float]:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    low, high = raw.get("time_step_limit") or (0.0, math.inf)
    return float(low), float(high["__float__"] if isinstance(high, dict) else high)


def _granite_words(shape: ModelShape, layer: int) -> Words:
    experts = shape.experts
    mixer = ATTENTION if layer in shape.attention_layers else _MAMBA2
    return {
        **NORMS,
        **mixer,
        **(granite_experts(shape) if experts else {}),
        **granite_shared(shape, experts.shared if experts else shape.ffn),
    }


_MAMBA2: Words = {
    "mamba.in_proj": ("ssm.projected", "hidden"),
    "mamba.conv1d": ("ssm.conv", 1, "ssm.conv_kernel"),
    "mamba.conv1d.bias": ("ssm.conv",),
    "mamba.dt_bias": ("ssm.steps",),
    "mamba.A_log": ("ssm.steps",),
    "mamba.D": ("ssm.steps",),
    "mamba.norm": ("ssm.inner",),
    "mamba.out_proj": ("hidden", "ssm.inner"),
}


def _granite_stacks(shape: ModelShape, layer: int) -> dict[str, Stack]:
    experts, ssm = shape.experts, shape.ssm
    assert ssm is not None
    stacks = granite_expert_stacks(shape) if experts else {}
    width, end = (experts.shared, "_shexp") if experts else (shape.ffn, "")
    stacks |= granite_shared_stacks(shape, width, end)
    if layer in ssm.layers:
        conv, heads, groups = ssm.conv, ssm.steps, ssm.groups
        stacks |= {
            "ssm_conv1d.weight": _whole("mamba.conv1d.weight", conv, conv, ssm.conv_kernel),
            "ssm_dt.bias": _whole("mamba.dt_bias", heads, heads),
            "ssm_a": _whole("mamba.A_log", heads, heads, 1),
            "ssm_d": _whole("mamba.D", heads, heads, 1),
            "ssm_norm.weight": _whole("mamba.norm.weight", ssm.inner, groups, ssm.inner // groups),
        }
    return stacks


def _granite_keys(raw: dict[str, Any], shape: ModelShape) -> None:
    granite_scales(raw, shape)
    granite_expert_keys(shape)
    # A switch of llama.cpp's, which says nothing of scaling here: whether positions turn at all.
    shape.keys[Keys.Rope.SCALING_FINETUNED] = raw.get("position_embedding_type") == "rope"


GRANITE_HYBRID = Family(
    arch=MODEL_ARCH.GRANITE_HYBRID,
    permuted=True,
    layer=_granite_words,
    stacks=_granite_stacks,
    biases=frozenset(ATTENTION),
    required=SILU | {"mamba_proj_bias": False},
    scalings=ALL_SCALINGS,
    fields=_granite,
    more=_granite_keys,
)


# ---------------------------------------------------------------- Jamba


def _jamba(raw: dict[str, Any]) -> dict[str, Any]:
    layers, hidden, heads = range(raw["num_hidden_layers"]), *_widths(raw)
    period, offset = raw["attn_layer_period"], raw["attn_layer_offset"]
    attending = {layer for layer in layers if layer % period == offset}
    if (raw.get("head_dim") or hidden // heads) * heads != hidden:
        raise ValueError("heads of another width than hidden_size / num_attention_heads")
    rank = raw.get("mamba_dt_rank")
    ssm = Recurrence(
        layers=frozenset(layers) - attending,
        inner=raw["mamba_expand"] * hidden,
        state=raw["mamba_d_state"],
        steps=-(-hidden // _JAMBA_RANK) if rank in (None, "auto") else rank,
        conv_kernel=raw["mamba_d_conv"],
    )
    found: dict[str, Any] = {"ssm": _checked(raw, ssm)}
    period, offset = raw.get("expert_layer_period", 2), raw.get("expert_layer_offset", 1)
    mixed = frozenset(layer for layer in layers if layer % period == offset)
    if raw.get("num_experts", 16) > 1 and mixed:
        found["experts"] = Experts(
            count=raw.get("num_experts", 16),
            used=raw["num_experts_per_tok"],
            ffn=raw["intermediate_size"],
            layers=mixed,
        )
    return found


def _widths(raw: dict[str, Any]) -> tuple[int, int]:
    return raw["hidden_size"], raw["num_attention_heads"]


_MAMBA1: Words = {
    "mamba.in_proj": ("ssm.doubled", "hidden"),
    "mamba.conv1d": ("ssm.inner", 1, "ssm.conv_kernel"),
    "mamba.conv1d.bias": ("ssm.inner",),
    "mamba.x_proj": ("ssm.step_inputs", "ssm.inner"),
    "mamba.dt_layernorm": ("ssm.steps",),
    "mamba.b_layernorm": ("ssm.state",),
    "mamba.c_layernorm": ("ssm.state",),
    "mamba.dt_proj": ("ssm.inner", "ssm.steps"),
    "mamba.dt_proj.bias": ("ssm.inner",),
    "mamba.A_log": ("ssm.inner", "ssm.state"),
    "mamba.D": ("ssm.inner",),
    "mamba.out_proj": ("hidden", "ssm.inner"),
}
_JAMBA_MLP: Words = {
    "feed_forward.gate_proj": ("ffn", "hidden"),
    "feed_forward.up_proj": ("ffn", "hidden"),
    "feed_forward.down_proj": ("hidden", "ffn"),
}


def _jamba_words(shape: ModelShape, layer: int) -> Words:
    mlp = _JAMBA_MLP
    if shape.has_experts(layer):
        router = {"feed_forward.router": ("experts.count", "hidden")}
        mlp = {**router, **expert_words(shape, "feed_forward")}
    mixer = ATTENTION if layer in shape.attention_layers else _MAMBA1
    return {"input_layernorm": ("hidden",), "pre_ff_layernorm": ("hidden",), **mixer, **mlp}


def _jamba_stacks(shape: ModelShape, layer: int) -> dict[str, Stack]:
    ssm = shape.ssm
    assert ssm is not None
    stacks = expert_stacks(shape, "feed_forward") if shape.has_experts(layer) else {}
    if layer in ssm.layers:
        inner = ssm.inner
        stacks["ssm_conv1d.weight"] = _whole("mamba.conv1d.weight", inner, inner, ssm.conv_kernel)
    return stacks


JAMBA = Family(
    arch=MODEL_ARCH.JAMBA,
    permuted=False,
    layer=_jamba_words,
    stacks=_jamba_stacks,
    required=SILU | {"mamba_proj_bias": False},
    scalings=frozenset({"default"}),
    turned=False,
    last_norm="model.final_layernorm",
    fields=_jamba,
)
