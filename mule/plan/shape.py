"""From the recipe's section `model` to the shape of a new model, and back. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mule.config.architecture import ModelSection, MoESection
from mule.config.schema import Recipe
from mule.errors import ConfigError
from mule.models.config import MambaConfig, ModelConfig, MoEConfig, Routing, named_size
from mule.models.standard import GRANITE, family_fields, mamba_config, mamba_layers, null_heads

_WIDTH_STEP = 32  # of experts; smaller parts of a row no GGUF type can hold
_MAMBA = "state_size num_heads head_dim num_groups conv_kernel chunk_size dt_rank".split()


def new_model_config(recipe: Recipe, tokenizer_size: int) -> ModelConfig:
    """The shape of a model trained from scratch."""
    m = recipe.model
    if m.module is not None:
        file = m.module.rpartition(":")[0]
        raise ConfigError(
            [
                f"model.module = {m.module}: only a campaign trains a module of your own: it measures "
                "the module first, and needs your word to run its file"
            ],
            "make it a variant of a campaign (or go on with the one it has), and run that: mule lab run "
            f"CAMPAIGN.yaml --module {file}",
        )
    dimensions = (m.hidden_size, m.num_layers, m.num_heads if m.attends else 1)
    if m.size is None and None in dimensions:
        raise ConfigError(
            ["the model has no shape: neither model.size, nor model.path, nor all dimensions"],
            "set model.size (for example 10m), or model.path to start from a trained model",
        )
    rows = m.vocab_size or embedding_rows(tokenizer_size)
    if rows < tokenizer_size:
        raise ConfigError(
            [f"model.vocab_size = {rows} is below the tokenizer's {tokenizer_size} tokens"],
            "remove model.vocab_size, or raise it",
        )
    hidden, num_layers = _pick(m, "hidden_size", 0), _pick(m, "num_layers", 0)
    heads = _heads(m, hidden)
    inner = _pick(m, "intermediate_size", -(-hidden * 8 // (3 * 256)) * 256)
    moe = _experts(m, inner) if m.has_experts else None
    with_mamba: tuple[int, ...] = ()
    if m.mixer != "attention":
        with_mamba = mamba_layers(num_layers, m.mamba.attention_every)
    attending = tuple(i for i in range(num_layers) if i not in with_mamba)
    return ModelConfig(
        family=m.family,
        vocab_size=rows,
        hidden_size=hidden,
        num_layers=num_layers,
        **heads,
        intermediate_size=inner if moe is None else moe.intermediate_size,
        max_position_embeddings=m.max_position_embeddings or recipe.data.max_seq_length,
        rope_theta=m.rope_theta,
        tie_embeddings=m.tie_embeddings,
        **family_fields(m.family, heads["head_dim"]),
        sliding_window=m.sliding_window,
        sliding_layers=_window_layers(m, num_layers),
        nope_layers=() if m.has_rope else attending,
        moe=moe,
        mamba=_mamba(m, hidden),
        mamba_layers=with_mamba,
    )


def embedding_rows(num_tokens: int) -> int:
    """Rows of the embedding of a vocabulary: a multiple of 64, which products are fastest with."""
    return -(-num_tokens // 64) * 64


def routing_of(recipe: Recipe) -> Routing:
    """How the recipe trains a mixture of experts; what it leaves open is the default."""
    return Routing(**recipe.model.moe.routing())


def check_routing(recipe: Recipe, config: ModelConfig) -> None:
    """Raise ConfigError where a router's settings meet a model to start from that has no experts."""
    asked = list(recipe.model.moe.routing())
    if asked and recipe.adapter.kind != "none":
        raise ConfigError(
            [
                f"model.moe.{asked[0]} cannot take effect: adapter.kind={recipe.adapter.kind} leaves "
                "the routers as they are"
            ],
            f"remove {', '.join(f'model.moe.{name}' for name in asked)}",
        )
    moe = config.moe
    if moe and moe.experts_per_token == 1 and moe.renormalize and recipe.adapter.kind == "none":
        raise ConfigError(
            [
                "with one expert a token its weight is always 1: the loss would teach the router "
                "nothing"
            ],
            "set model.moe.experts_per_token=2",
        )
    if asked and moe is None:
        raise ConfigError(
            [
                f"model.moe.{asked[0]} cannot take effect: model.path={recipe.model.path} is a "
                f"{config.family} without experts"
            ],
            f"remove {', '.join(f'model.moe.{name}' for name in asked)}",
        )


def model_settings(config: ModelConfig, routing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings, by their dotted keys, that `new_model_config` makes this very config of.

    `routing` is what a section of a mixture's training has set (`RoutingSection.routing`).
    """
    settings: dict[str, Any] = {
        "family": config.family,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_embeddings": config.tie_embeddings,
    }
    if config.attention_layers:
        heads = ("num_heads", "num_kv_heads", "head_dim")
        settings |= {name: getattr(config, name) for name in heads}
    has_rope = config.nope_layers != config.attention_layers
    if has_rope:
        settings["rope_theta"] = config.rope_theta
    if config.family == "granitemoehybrid" and config.attention_layers:
        settings["position_embedding"] = "rope" if has_rope else "none"
    if config.sliding_window is not None:
        settings["sliding_window"] = config.sliding_window
        if config.family == "qwen3":
            settings["sliding_layers"] = list(config.sliding_layers)
    if config.moe is None:
        settings["intermediate_size"] = config.intermediate_size
    found = {f"model.{key}": value for key, value in settings.items()} | _mixer_settings(config)
    return found | {f"model.moe.{key}": value for key, value in (routing or {}).items()}


def _mixer_settings(config: ModelConfig) -> dict[str, Any]:
    """Of experts and state-space layers."""
    settings: dict[str, Any] = {}
    if moe := config.moe:
        names = ("num_experts", "experts_per_token", "intermediate_size")
        settings |= {f"model.moe.{name}": getattr(moe, name) for name in names}
        if config.family != "qwen3_moe":
            settings["model.moe.shared_intermediate_size"] = moe.shared_intermediate_size
    if mamba := config.mamba:
        others = (
            ("dt_rank",) if mamba.kind == "mamba2" else ("head_dim", "num_groups", "chunk_size")
        )
        names = [name for name in _MAMBA if name not in others]
        settings |= {f"model.mamba.{name}": getattr(mamba, name) for name in names}
        if config.attention_layers:
            settings["model.mamba.attention_every"] = config.attention_layers[0] + 1
    elif config.family == "granitemoehybrid":
        settings["model.mamba.kind"] = "none"
    return settings


def _pick(m: ModelSection, name: str, fallback: int) -> int:
    """A dimension as given, as the named size has it, or else `fallback`."""
    named = named_size(m.size) if m.size else None
    return getattr(m, name) or (getattr(named, name) if named else fallback)


def _heads(m: ModelSection, hidden: int) -> dict[str, Any]:
    """Of attention; a model without gets those of the layer of zeros that its files hold."""
    if not m.attends:
        return {**null_heads(m.family, hidden)}
    heads = _pick(m, "num_heads", 0)
    found = {"num_heads": heads, "num_kv_heads": _pick(m, "num_kv_heads", heads)}
    return found | {"head_dim": _pick(m, "head_dim", hidden // max(heads, 1))}


def _experts(m: ModelSection, dense_size: int) -> MoEConfig:
    """Of a mixture that replaces a feed-forward layer `dense_size` wide."""
    moe: MoESection = m.moe
    chosen = moe.experts_per_token or 2
    shared, has_shared = moe.shared_intermediate_size, m.family in GRANITE
    alike = chosen + (1 if has_shared and shared is None else 0)  # that the width is divided among
    even = max(1, (dense_size - (shared or 0)) // (alike * _WIDTH_STEP)) * _WIDTH_STEP
    size = moe.intermediate_size or even
    if shared is None:
        shared = size if has_shared else 0
    return MoEConfig(moe.num_experts or 8, chosen, size, shared)


def _mamba(m: ModelSection, hidden: int) -> MambaConfig | None:
    if m.mixer == "attention":
        return None
    given = {name: getattr(m.mamba, name) for name in _MAMBA}
    given = {name: value for name, value in given.items() if value is not None}
    return mamba_config(m.mixer, hidden, given)


def _window_layers(m: ModelSection, num_layers: int) -> tuple[int, ...]:
    if m.sliding_window is None:
        return ()
    layers = tuple(sorted(set(m.sliding_layers or range(num_layers))))
    if layers[-1] >= num_layers:
        raise ConfigError(
            [f"model.sliding_layers names block {layers[-1]} of {num_layers}, counted from 0"],
            f"give numbers up to {num_layers - 1}",
        )
    return layers
