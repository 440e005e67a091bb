"""Families with a mixture of experts in every block: Qwen3-MoE, and Granite's with a shared expert."""

from __future__ import annotations

from typing import Any

from gguf.constants import MODEL_ARCH, Keys

from mule.export.families.shape import (
    ALL_SCALINGS,
    ATTENTION,
    NO_WINDOW,
    NORMS,
    QK_NORMS,
    QKV_BIAS,
    SILU,
    Experts,
    Family,
    ModelShape,
    Part,
    Stack,
    Words,
    granite_scales,
)

_PROJECTIONS = ("gate", "up", "down")


def expert_words(shape: ModelShape, below: str) -> Words:
    """Three matrices an expert, as transformers saves them: `below`.experts.N.gate_proj ..."""
    assert shape.experts is not None
    wide = ("experts.ffn", "hidden")
    shapes = {"gate": wide, "up": wide, "down": wide[::-1]}
    return {
        f"{below}.experts.{expert}.{part}_proj": shapes[part]
        for expert in range(shape.experts.count)
        for part in _PROJECTIONS
    }


def expert_stacks(shape: ModelShape, below: str) -> dict[str, Stack]:
    """The same, one tensor for all experts: (experts, rows, columns)."""
    experts = shape.experts
    assert experts is not None
    stacks = {}
    for part in _PROJECTIONS:
        sizes = (experts.ffn, shape.hidden) if part != "down" else (shape.hidden, experts.ffn)
        parts = [
            Part(f"{below}.experts.{expert}.{part}_proj.weight", 0, sizes[0])
            for expert in range(experts.count)
        ]
        stacks[f"ffn_{part}_exps.weight"] = Stack(tuple(parts), (experts.count, *sizes))
    return stacks


def granite_experts(shape: ModelShape) -> Words:
    """The experts' matrices in one weight each, gate above up in each expert's, and the router."""
    assert shape.experts is not None
    return {
        "block_sparse_moe.input_linear": ("experts.count", 2 * shape.experts.ffn, "hidden"),
        "block_sparse_moe.output_linear": ("experts.count", "hidden", "experts.ffn"),
        "block_sparse_moe.router.layer": ("experts.count", "hidden"),
    }


def granite_shared(shape: ModelShape, width: int) -> Words:
    """An MLP that every token passes, gate above up in one matrix."""
    return {
        "shared_mlp.input_linear": (2 * width, "hidden"),
        "shared_mlp.output_linear": ("hidden", width),
    }


def granite_expert_stacks(shape: ModelShape) -> dict[str, Stack]:
    """Gate and up of each expert apart, in one tensor each."""
    experts = shape.experts
    assert experts is not None
    fused, width, hidden = "block_sparse_moe.input_linear.weight", experts.ffn, shape.hidden

    def halves(first: int) -> Stack:
        starts = range(first, 2 * width * experts.count, 2 * width)
        parts = tuple(Part(fused, start, width) for start in starts)
        return Stack(parts, (experts.count, width, hidden))

    down = "block_sparse_moe.output_linear.weight"
    starts = range(0, hidden * experts.count, hidden)
    return {
        "ffn_gate_exps.weight": halves(0),
        "ffn_up_exps.weight": halves(width),
        "ffn_down_exps.weight": Stack(
            tuple(Part(down, start, hidden) for start in starts), (experts.count, hidden, width)
        ),
    }


def granite_shared_stacks(shape: ModelShape, width: int, end: str) -> dict[str, Stack]:
    """Gate, up and down of the MLP that every token passes; `end` of their names in the file."""
    fused, down = "shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"
    return {
        f"ffn_gate{end}.weight": Stack((Part(fused, 0, width),), (width, shape.hidden)),
        f"ffn_up{end}.weight": Stack((Part(fused, width, width),), (width, shape.hidden)),
        f"ffn_down{end}.weight": Stack((Part(down, 0, shape.hidden),), (shape.hidden, width)),
    }


# ---------------------------------------------------------------- Qwen3-MoE


def _qwen(raw: dict[str, Any]) -> dict[str, Any]:
    layers = raw["num_hidden_layers"]
    if raw.get("decoder_sparse_step", 1) != 1 or raw.get("mlp_only_layers"):
        raise ValueError("some layers have no experts, and llama.cpp expects them in all")
    count = raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"]
    experts = Experts(
        count=count,
        used=raw["num_experts_per_tok"],
        ffn=raw["moe_intermediate_size"],
        layers=frozenset(range(layers)),
    )
    return {"experts": experts, "ffn": raw.get("intermediate_size", experts.ffn)}


def _qwen_keys(_: dict[str, Any], shape: ModelShape) -> None:
    assert shape.experts is not None
    shape.keys[Keys.LLM.EXPERT_FEED_FORWARD_LENGTH] = shape.experts.ffn


QWEN3_MOE = Family(
    arch=MODEL_ARCH.QWEN3MOE,
    permuted=False,
    layer=lambda shape, _: {
        **NORMS,
        **ATTENTION,
        **QK_NORMS,
        "mlp.gate": ("experts.count", "hidden"),
        **expert_words(shape, "mlp"),
    },
    stacks=lambda shape, _: expert_stacks(shape, "mlp"),
    biases=QKV_BIAS,
    required=SILU | NO_WINDOW | {"norm_topk_prob": True},
    fields=_qwen,
    more=_qwen_keys,
)


# ---------------------------------------------------------------- Granite with a shared expert


def granite_expert_fields(raw: dict[str, Any]) -> Experts:
    """The experts of a Granite model, which all its blocks have."""
    return Experts(
        count=raw["num_local_experts"],
        used=raw["num_experts_per_tok"],
        ffn=raw["intermediate_size"],
        layers=frozenset(range(raw["num_hidden_layers"])),
        shared=raw.get("shared_intermediate_size") or 0,
    )


def granite_expert_keys(shape: ModelShape) -> None:
    """The width of the shared expert."""
    if shape.experts is not None and shape.experts.shared:
        shape.keys[Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH] = shape.experts.shared


def _granite_words(shape: ModelShape, _: int) -> Words:
    assert shape.experts is not None
    shared = shape.experts.shared
    return {
        **NORMS,
        **ATTENTION,
        **granite_experts(shape),
        **(granite_shared(shape, shared) if shared else {}),
    }


def _granite_stacks(shape: ModelShape, _: int) -> dict[str, Stack]:
    assert shape.experts is not None
    shared = shape.experts.shared
    more = granite_shared_stacks(shape, shared, "_shexp") if shared else {}
    return granite_expert_stacks(shape) | more


def _granite_keys(raw: dict[str, Any], shape: ModelShape) -> None:
    granite_scales(raw, shape)
    granite_expert_keys(shape)


GRANITE_MOE_SHARED = Family(
    arch=MODEL_ARCH.GRANITE_MOE,
    permuted=True,
    layer=_granite_words,
    stacks=_granite_stacks,
    biases=frozenset(ATTENTION),
    required=SILU,
    scalings=ALL_SCALINGS,
    fields=lambda raw: {"experts": granite_expert_fields(raw)},
    more=_granite_keys,
)
