"""The model of a variant, once its sizes are known. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mule.config.lab import VariantSection
from mule.errors import ModelError
from mule.models.config import MambaConfig, ModelConfig, MoEConfig
from mule.models.standard import family_fields, mamba_config, mamba_layers, null_heads

_HYBRID_EVERY = 6


@dataclass(frozen=True)
class Sizes:
    """What a variant does not say itself."""

    vocab_size: int
    max_seq_length: int
    tie_embeddings: bool
    hidden_size: int
    head_dim: int
    num_layers: int
    num_heads: int
    width: int  # of the feed-forward layer, or of an expert
    shared_width: int  # of the expert that every token passes, where there is one


def attention_every(variant: VariantSection) -> int | None:
    """Every so many-th block of Mamba models attends; None: all or none."""
    return variant.attention_every or (_HYBRID_EVERY if variant.mixer == "hybrid" else None)


def variant_config(variant: VariantSection, sizes: Sizes) -> ModelConfig:
    """The whole shape."""
    mamba = _mamba(variant, sizes.hidden_size)
    with_mamba = () if mamba is None else mamba_layers(sizes.num_layers, attention_every(variant))
    family = _family(variant)
    heads = _heads(variant, sizes, family)
    attending = tuple(i for i in range(sizes.num_layers) if i not in with_mamba)
    return ModelConfig(
        family=family,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        **heads,
        intermediate_size=sizes.width,
        max_position_embeddings=sizes.max_seq_length,
        tie_embeddings=sizes.tie_embeddings,
        **family_fields(family, heads["head_dim"]),
        sliding_window=variant.sliding_window,
        sliding_layers=attending if variant.sliding_window else (),
        nope_layers=() if _has_rope(variant) else attending,
        moe=_experts(variant, sizes),
        mamba=mamba,
        mamba_layers=with_mamba,
    )


def kv_heads_of(variant: VariantSection, heads: int) -> int:
    """Key/value heads where a model that spends on nothing has so many query heads."""
    if variant.attention != "gqa":
        return heads if variant.attention == "mha" else 1
    divisors = [count for count in range(1, heads) if heads % count == 0]
    if variant.num_kv_heads is None:
        if not divisors:
            raise ModelError(
                f"{heads} query head cannot share anything",
                "use attention: mha, or a larger budget",
            )
        return min(divisors, key=lambda count: abs(count - heads / 4))
    if variant.num_kv_heads not in divisors:
        raise ModelError(
            f"{heads} query heads cannot share num_kv_heads = {variant.num_kv_heads}",
            f"choose num_kv_heads among {', '.join(map(str, divisors))}"
            if divisors
            else "use attention: mha, or a larger budget",
        )
    return variant.num_kv_heads


def _heads(variant: VariantSection, sizes: Sizes, family: str) -> dict[str, Any]:
    if not variant.attends:
        return {**null_heads(family, sizes.hidden_size)}
    heads, usual = sizes.num_heads, sizes.hidden_size // sizes.head_dim
    kv_heads = heads if variant.attention == "mha" else kv_heads_of(variant, usual)
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": sizes.head_dim}


def _experts(variant: VariantSection, sizes: Sizes) -> MoEConfig | None:
    if variant.num_experts is None:
        return None
    shared = sizes.shared_width if variant.shared_expert else 0
    return MoEConfig(variant.num_experts, variant.experts_per_token or 2, sizes.width, shared)


def _mamba(variant: VariantSection, hidden_size: int) -> MambaConfig | None:
    if variant.mixer == "attention":
        return None
    given = {"state_size": variant.state_size} if variant.state_size else {}
    return mamba_config("mamba1" if variant.mixer == "mamba1" else "mamba2", hidden_size, given)


def _family(variant: VariantSection) -> str:
    """The family whose files can say what a variant is."""
    if variant.mixer == "mamba1":
        return "jamba"
    if variant.mixer != "attention" or variant.position_embedding == "none":
        return "granitemoehybrid"
    if variant.num_experts is not None:
        return "granitemoeshared" if variant.shared_expert else "qwen3_moe"
    return variant.family or "qwen3"


def _has_rope(variant: VariantSection) -> bool:
    if variant.mixer == "attention":
        return variant.position_embedding != "none"
    return variant.position_embedding == "rope"
