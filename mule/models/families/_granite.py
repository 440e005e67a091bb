"""What Granite's mixtures and hybrids share: their multipliers, and the names in their files."""

from __future__ import annotations

from mule.models.config import ModelConfig
from mule.models.families._dense import Raw

MULTIPLIERS = (
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
    "attention_multiplier",
)


def multipliers_from_hf(raw: Raw) -> dict[str, float]:
    """The fields of the four multipliers, which `checked` gave a default."""
    return {
        "embedding_scale": raw["embedding_multiplier"],
        "residual_scale": raw["residual_multiplier"],
        "attention_scale": raw["attention_multiplier"],
        "logit_scale": 1 / raw["logits_scaling"],
    }


def multipliers_to_hf(config: ModelConfig) -> Raw:
    """The four multipliers, all of them: what a class of transformers takes where one is missing is
    not what other programs take."""
    scale = config.attention_scale
    return {
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.head_dim**-0.5 if scale is None else scale,
        "logits_scaling": float(f"{1 / config.logit_scale:.12g}"),
    }


def stored_mlp_names(config: ModelConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """What the files call a block's feed-forward layer: without experts it is the shared one."""
    start = f"model.layers.{layer}"
    ours = f"{start}.mlp"
    if not config.has_experts(layer):
        return _shared(ours, start)
    assert config.moe is not None
    names: dict[str, tuple[str, ...]] = {
        f"{ours}.gate.weight": (f"{start}.block_sparse_moe.router.layer.weight",),
        f"{ours}.experts.gate_up_proj": (f"{start}.block_sparse_moe.input_linear.weight",),
        f"{ours}.experts.down_proj": (f"{start}.block_sparse_moe.output_linear.weight",),
    }
    if not config.moe.shared_intermediate_size:
        return names
    return names | _shared(f"{ours}.shared_expert", start)


def _shared(ours: str, start: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{ours}.gate_up_proj.weight": (f"{start}.shared_mlp.input_linear.weight",),
        f"{ours}.down_proj.weight": (f"{start}.shared_mlp.output_linear.weight",),
    }
