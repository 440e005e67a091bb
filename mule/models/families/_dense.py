"""What the families share: reading, checking and writing the keys of a transformers config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mule.errors import ModelError
from mule.models.config import ModelConfig
from mule.models.families._rope import rope_from_hf, rope_to_hf

Raw = dict[str, Any]
_BIASES = ("attention_bias", "mlp_bias")

# Keys that do not change what our decoder computes.
_HARMLESS = frozenset(
    """architectures model_type torch_dtype dtype transformers_version use_cache initializer_range
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id attention_dropout
    resid_pdrop embd_pdrop pretraining_tp name_or_path _name_or_path model_name return_dict
    output_hidden_states output_attentions is_decoder id2label label2id problem_type auto_map
    chunk_size_feed_forward is_encoder_decoder tie_encoder_decoder cache_implementation
    tokenizer_class task_specific_params ignore_keys_at_rope_validation finetuning_task prefix
    _attn_implementation_autoset attn_implementation _commit_hash use_bfloat16 transformers.js_config
    max_length min_length do_sample num_beams temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size num_return_sequences early_stopping is_llama_config""".split()
)
_READ = frozenset(
    """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size max_position_embeddings rope_theta rope_parameters rope_scaling rms_norm_eps
    tie_word_embeddings original_max_position_embeddings""".split()
)
# Keys that change the computation, with the only values we compute.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "use_sliding_window": (False,),
    "use_bidirectional_attention": (False,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "partial_rotary_factor": (1, 1.0),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "pruned_heads": ({},),
    "torchscript": (False,),
    "cross_attention_hidden_size": (),
    "add_cross_attention": (False,),
}
_COUNTS = """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size max_position_embeddings original_max_position_embeddings sliding_window
    sliding_window_pattern no_rope_layer_interval
    mamba_n_heads mamba_n_groups mamba_d_state mamba_d_conv mamba_expand mamba_chunk_size
    attn_layer_period expert_layer_period""".split()
_COUNTS_FROM_ZERO = """num_local_experts num_experts num_experts_per_tok shared_intermediate_size
    attn_layer_offset expert_layer_offset""".split()
_LISTS, _TABLES = (
    ("layer_types", "layer_type", "layers_block_type", "no_rope_layers"),
    ("rope_scaling", "rope_parameters"),
)
_DEFAULTS: Raw = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


def checked(
    raw: Raw,
    *,
    defaults: Mapping[str, Any] | None = None,
    reads: str = "",
    required: Mapping[str, tuple[Any, ...]] | None = None,
) -> Raw:
    """`raw` with what the transformers class takes where a key is missing.

    `reads` are the keys that the family understands beyond those of all, `required` those with the
    only values that Mule computes. Raises ModelError for every other key.
    """
    _refuse_types(raw)
    read, wanted = _READ | set(reads.split()), _REQUIRED | dict(required or {})
    for key, value in raw.items():
        if value is None or key in read or key in _HARMLESS or key.startswith("unsloth"):
            continue
        if key in wanted and value in wanted[key]:
            continue
        if key in ("sliding_window", "max_window_layers") and not raw.get("use_sliding_window"):
            continue
        if key == "layer_types" and set(value) == {"full_attention"}:
            continue
        raise ModelError(
            f"config.json sets {key} = {value!r}, which Mule does not compute",
            "use a model without it: ignoring the key would change the results silently",
        )
    return _DEFAULTS | dict(defaults or {}) | raw


def _refuse_types(raw: Raw) -> None:
    for key, value in raw.items():
        if value is None:
            continue
        is_whole = isinstance(value, int) and value >= 0
        for keys, right, what in (
            (_COUNTS, is_whole and value > 0, "a whole number above 0"),
            (_COUNTS_FROM_ZERO, is_whole, "a whole number"),
            (_LISTS, isinstance(value, list), "a list"),
            (_TABLES, isinstance(value, dict), "a table"),
        ):
            if key in keys and not right:
                raise ModelError(
                    f"config.json sets {key} = {value!r}, which is not {what}",
                    "download the model again, or restore the key",
                )


def dense_from_hf(raw: Raw, **fields: Any) -> ModelConfig:
    """Our config of what `checked` gave; `fields` are what the family sets beyond the usual."""
    try:
        num_heads, hidden_size = raw["num_attention_heads"], raw["hidden_size"]
        head_dim = raw.get("head_dim") or hidden_size // num_heads
        if "rope_theta" not in fields:
            theta, scaling = rope_from_hf(raw, fields.get("rotary_dim") or head_dim)
            fields |= {"rope_theta": theta, "rope_scaling": scaling}
        return ModelConfig(
            family=raw["model_type"],
            vocab_size=raw["vocab_size"],
            hidden_size=hidden_size,
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            intermediate_size=raw["intermediate_size"],
            max_position_embeddings=raw["max_position_embeddings"],
            norm_eps=raw["rms_norm_eps"],
            tie_embeddings=raw["tie_word_embeddings"],
            **fields,
        )
    except KeyError as error:
        raise ModelError(
            f"config.json has no {error}", "download the model again, or restore the key"
        ) from None


def dense_to_hf(config: ModelConfig, architecture: str) -> Raw:
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
        **rope_to_hf(config),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": config.o_bias,
    }


def biases(raw: Raw) -> dict[str, bool]:
    """The fields of `attention_bias`, on all four projections, and of `mlp_bias`."""
    attention, mlp = (bool(raw.get(key)) for key in _BIASES)
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp}


def sliding(raw: Raw, default: list[str]) -> dict[str, Any]:
    """The fields of `sliding_window` and `layer_types`; `default` is what the class derives."""
    types, window = raw.get("layer_types") or default, raw.get("sliding_window")
    if len(types) != raw.get("num_hidden_layers") or set(types) - {
        "full_attention",
        "sliding_attention",
    }:
        raise ModelError(
            f"config.json sets layer_types = {types!r}, which Mule does not compute",
            "use a model with full_attention or sliding_attention in each of its layers",
        )
    layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if layers and not window:
        raise ModelError(
            f"config.json has sliding layers and sliding_window = {window!r}",
            "download the model again, or restore the key",
        )
    return {"sliding_window": window, "sliding_layers": layers}


def every_layer(raw: Raw) -> list[str]:
    """The layer types of a class that slides in all layers, or in none."""
    kind = "sliding_attention" if raw.get("sliding_window") else "full_attention"
    return [kind] * raw.get("num_hidden_layers", 0)


def window_layers(raw: Raw) -> Raw:
    """`raw` as the Qwen classes read it: the window counts only where `use_sliding_window` is set."""
    return raw if raw.get("use_sliding_window") else raw | {"sliding_window": None}


def upper_layers(raw: Raw) -> list[str]:
    """The layer types of the Qwen classes: sliding from `max_window_layers` up."""
    num_layers = raw.get("num_hidden_layers", 0)
    first = raw["max_window_layers"] if raw.get("sliding_window") else num_layers
    return ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]


def layer_types(config: ModelConfig) -> list[str]:
    """The `layer_types` of config.json."""
    return [
        "sliding_attention" if i in config.sliding_layers else "full_attention"
        for i in range(config.num_layers)
    ]
