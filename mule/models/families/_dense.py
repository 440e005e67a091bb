"""What the dense families share: reading and checking the keys of a transformers config.json."""

from __future__ import annotations

from typing import Any

from mule.errors import ModelError
from mule.models.config import ModelConfig

# Keys that do not change what our decoder computes.
_HARMLESS = frozenset(
    """architectures model_type torch_dtype dtype transformers_version use_cache initializer_range
    bos_token_id eos_token_id pad_token_id attention_dropout pretraining_tp name_or_path _name_or_path
    max_window_layers return_dict output_hidden_states output_attentions is_decoder id2label label2id
    problem_type auto_map chunk_size_feed_forward is_encoder_decoder tie_encoder_decoder""".split()
)
_READ = frozenset(
    """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size max_position_embeddings rope_theta rope_parameters rope_scaling rms_norm_eps
    tie_word_embeddings""".split()
)
# Keys that change the computation, with the only value we compute.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
}


def dense_from_hf(raw: dict[str, Any], *, qk_norm: bool) -> ModelConfig:
    """Our config for a dense decoder; every key that we do not understand is refused."""
    _refuse_unknown(raw)
    try:
        num_heads, hidden_size = raw["num_attention_heads"], raw["hidden_size"]
        return ModelConfig(
            family=raw["model_type"],
            vocab_size=raw["vocab_size"],
            hidden_size=hidden_size,
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or hidden_size // num_heads,
            intermediate_size=raw["intermediate_size"],
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rope_theta=_rope_theta(raw),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            qk_norm=qk_norm,
            tie_embeddings=raw.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ModelError(
            f"config.json has no {error}", "download the model again, or restore the key"
        ) from None


def dense_to_hf(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The config.json of a dense decoder, readable by transformers 4 and 5."""
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def _rope_theta(raw: dict[str, Any]) -> float:
    """The base of the rotary angles, from transformers 5's `rope_parameters` or 4's `rope_theta`."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ModelError(
            f"config.json asks for RoPE scaling of kind {kind!r}, which Mule does not compute yet",
            "use a model without RoPE scaling",
        )
    return float(parameters.get("rope_theta", raw.get("rope_theta", 10_000.0)))


def _refuse_unknown(raw: dict[str, Any]) -> None:
    for key, value in raw.items():
        if key in _HARMLESS or key in _READ or value is None:
            continue
        if key in _REQUIRED and value in _REQUIRED[key]:
            continue
        if key == "sliding_window" and not raw.get("use_sliding_window"):
            continue
        if key == "layer_types" and set(value) == {"full_attention"}:
            continue
        raise ModelError(
            f"config.json sets {key} = {value!r}, which Mule does not compute",
            "use a model without it: ignoring the key would change the results silently",
        )
