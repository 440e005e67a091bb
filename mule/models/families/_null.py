"""The null attention layer: what a model without any attention gets in its files.

transformers and llama.cpp keep a cache of keys for a model of these families, and fail where no layer
has any. So the files of a model that is all state-space layers hold one block more, all zeros, that
attends: it adds nothing, and the logits stay what they were, to the bit. It is never trained, computed
or counted here: a ModelConfig does not know of it, config.json says that it is there.
"""

from __future__ import annotations

from collections.abc import Mapping

from mule.models.config import ModelConfig

KEY = "null_attention_layer"


def has_null_layer(config: ModelConfig) -> bool:
    """Whether the files of this model have it."""
    return config.mamba is not None and not config.attention_layers


def null_shapes(
    config: ModelConfig, second_norm: str, mlp: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of its weights, by their names in files.

    `mlp` are those of the family's feed-forward layer, `second_norm` is the norm before it.
    """
    if not has_null_layer(config):
        return {}
    hidden = config.hidden_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query),
        second_norm: (hidden,),
        **mlp,
    }
    start = f"model.layers.{config.num_layers}"
    return {f"{start}.{name}.weight": shape for name, shape in shapes.items()}
