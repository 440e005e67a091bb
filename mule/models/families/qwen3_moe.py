"""Qwen3 with experts (transformers `Qwen3MoeForCausalLM`): Qwen3-30B-A3B, Qwen3-235B-A22B.

Files hold each expert's matrices apart; the window, where there is one, is that of every block.
"""

from __future__ import annotations

from typing import Any

from mule.errors import ModelError
from mule.models.config import ModelConfig, MoEConfig
from mule.models.families import _dense

_DEFAULTS = {
    "max_position_embeddings": 32_768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "sliding_window": 4096,
}
_READS = " ".join(
    (
        "attention_bias use_sliding_window max_window_layers num_local_experts",
        "output_router_logits router_aux_loss_coef",  # of training in transformers
        *_DEFAULTS,
    )
)


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    # transformers 5 writes the number of experts by another name than the hub's files have.
    raw = {"num_experts": raw.get("num_local_experts") or _DEFAULTS["num_experts"]} | raw
    raw = _dense.window_layers(_dense.checked(raw, defaults=_DEFAULTS, reads=_READS))
    moe = MoEConfig(
        num_experts=raw["num_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        intermediate_size=raw["moe_intermediate_size"],
        renormalize=bool(raw["norm_topk_prob"]),
        layers=_expert_layers(raw),
    )
    fields = _dense.biases(raw) | _dense.sliding(raw, _dense.every_layer(raw))
    return _dense.dense_from_hf(raw, qk_norm=True, moe=moe, **fields)


def _expert_layers(raw: dict[str, Any]) -> tuple[int, ...] | None:
    """The blocks that have experts; None for all."""
    count, step, dense = (
        raw.get(key) or 0 for key in ("num_hidden_layers", "decoder_sparse_step", "mlp_only_layers")
    )
    dense = set(dense or ())
    if step < 1 or dense - set(range(count)):
        raise ModelError(
            f"config.json sets decoder_sparse_step = {step} and mlp_only_layers = {sorted(dense)} "
            f"for {count} blocks, which does not fit",
            "download the model again, or restore the keys",
        )
    layers = tuple(i for i in range(count) if i not in dense and (i + 1) % step == 0)
    return None if len(layers) == count else layers


def to_hf(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None or moe.shared_intermediate_size:
        raise ModelError(
            "qwen3_moe has experts, and none that all tokens share",
            "set model.family=granitemoeshared for a shared expert, or qwen3 for none at all",
        )
    if config.sliding_layers and len(config.sliding_layers) < config.num_layers:
        raise ModelError(
            "the window of qwen3_moe is that of every block, and this model has it in some",
            "remove model.sliding_layers",
        )
    dense = [i for i in range(config.num_layers) if not config.has_experts(i)]
    return _dense.dense_to_hf(config, "Qwen3MoeForCausalLM") | {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "use_sliding_window": bool(config.sliding_layers),
        "sliding_window": config.sliding_window if config.sliding_layers else None,
    }


def stored_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Each expert's gate and up, one after the other, and each expert's down."""
    moe, names = config.moe, {}
    assert moe is not None
    for layer in range(config.num_layers):
        if not config.has_experts(layer):
            continue
        start = f"model.layers.{layer}.mlp.experts"
        starts = [f"{start}.{expert}" for expert in range(moe.num_experts)]
        names[f"{start}.gate_up_proj"] = tuple(
            f"{one}.{part}_proj.weight" for one in starts for part in ("gate", "up")
        )
        names[f"{start}.down_proj"] = tuple(f"{one}.down_proj.weight" for one in starts)
    return names
