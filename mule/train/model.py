"""The model that a run trains: its weights, what of them is frozen, and its adapter."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

import torch

from mule import progress
from mule.adapters.lora import add_lora
from mule.adapters.qlora import load_quantized, quantize_blocks
from mule.adapters.start import Start, begin
from mule.config.hints import near
from mule.config.schema import Recipe
from mule.errors import ConfigError
from mule.models import cost
from mule.models.config import ModelConfig, Routing
from mule.models.decoder import Decoder, empty_decoder
from mule.models.folder import load_weights
from mule.models.own_model import OwnModel
from mule.plan.memory import adapter_bytes
from mule.plan.shape import routing_of
from mule.train.distributed import Group
from mule.train.precision import DTYPES

Maker = Callable[[Recipe], Decoder]  # of a model in the place of the one that the recipe describes


def make_model(
    recipe: Recipe,
    config: ModelConfig,
    start: Start,
    group: Group,
    given: Decoder | None = None,
) -> Decoder:
    """The decoder in training mode, on the CPU: what is trained in fp32, as masters; what is frozen
    in the working precision, or in 4 bits. `given` is one that a `Maker` made, new and in fp32."""
    train, adapter = recipe.train, recipe.adapter
    dtype = DTYPES[train.precision]
    if given is not None:
        model = given
    elif adapter.engine == "mlx":
        model = _on_mlx(recipe, config, start)
    elif adapter.kind == "qlora":
        model = _quantized(recipe, config, start, dtype)
    else:
        model = _whole(recipe, config, start, torch.float32 if adapter.kind == "none" else dtype)
    if adapter.kind == "none":
        freeze(model, train.freeze, dtype)
    else:
        if adapter.engine == "torch":
            add_lora(model, adapter.lora, seed=train.seed)
        group.after_first(lambda: begin(model, adapter, start, train.seed))
    assert train.activation_checkpointing != "auto"
    model.set_training(
        dropout=train.dropout,
        recompute=train.activation_checkpointing,
        routing=_routing(recipe),
    )
    progress.note(_described(model, recipe))
    return model.train()


def _routing(recipe: Recipe) -> Routing | None:
    """How experts are balanced: not at all beside an adapter, for which the routers are frozen."""
    if recipe.adapter.engine == "mlx":
        return None  # computes them itself, and does not tell
    return routing_of(recipe) if recipe.adapter.kind == "none" else Routing("none", z_loss=0.0)


def _whole(recipe: Recipe, config: ModelConfig, start: Start, dtype: torch.dtype) -> Decoder:
    model = empty_decoder(config, dtype)
    if start.base_dir is None:
        model.init_weights(recipe.train.seed)
    else:
        load_weights(model, start.base_dir)
    return model


def _on_mlx(recipe: Recipe, config: ModelConfig, start: Start) -> Decoder:
    from mule.train.mlx.decoder import MlxDecoder

    assert start.base_dir is not None
    model = MlxDecoder(config, start.base_dir, recipe.train.precision)
    add_lora(model, recipe.adapter.lora, seed=recipe.train.seed)
    model.adapt()
    return model


def _quantized(recipe: Recipe, config: ModelConfig, start: Start, dtype: torch.dtype) -> Decoder:
    double_quant = recipe.adapter.lora.double_quant
    if start.base_dir is not None:
        return load_quantized(start.base_dir, config, dtype, double_quant=double_quant)
    model = _whole(recipe, config, start, dtype)
    quantize_blocks(model, double_quant=double_quant)
    return model


def freeze(model: Decoder, patterns: list[str], dtype: torch.dtype) -> None:
    """Train nothing whose name a pattern matches, and keep it in `dtype`.

    Raises ConfigError for a pattern that matches nothing, and when nothing is left to train.
    """
    named = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        found = {name for name in named if fnmatchcase(name, pattern)}
        if not found:
            raise _matches_nothing(pattern, model)
        frozen |= found
    if len(frozen) == len(named):
        raise ConfigError(
            [f"train.freeze = [{', '.join(patterns)}] leaves nothing to train"],
            "remove a pattern; or train an adapter beside the frozen model: adapter.kind=lora",
        )
    for name in frozen:
        named[name].requires_grad_(False)
        named[name].data = named[name].data.to(dtype)


def _matches_nothing(pattern: str, model: Decoder) -> ConfigError:
    if model.config.tie_embeddings and fnmatchcase("lm_head.weight", pattern):
        return ConfigError(
            [f"train.freeze = {pattern}: the head of this model is its embedding (tied)"],
            "name the embedding: model.embed_tokens.weight",
        )
    names = [name for name, _ in model.named_parameters()]
    parts = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
    close = near(pattern.rstrip(".*"), parts) or names[0]
    meant = close if close in names else f"{close}.*"
    return ConfigError(
        [f"train.freeze = {pattern} matches no weight; did you mean {meant}?"],
        "names are those of model.safetensors, such as model.embed_tokens.weight and "
        "model.layers.0.self_attn.q_proj.weight; * stands for any text",
    )


def _described(model: Decoder, recipe: Recipe) -> str:
    config = model.config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if isinstance(model, OwnModel):
        return f"model: {model.source.told}, {trained:,} weights trained"
    told = f"model: {config.family}, {cost.total_params(config):,} weights"
    if recipe.adapter.kind == "qlora":
        told += " (the blocks' matrices in 4 bits)"
    told += f", {trained:,} trained"
    if recipe.adapter.kind != "none":
        size = adapter_bytes(config, recipe) / 1e6
        shown = f"{size:,.1f} MB" if size >= 0.1 else f"{1000 * size:.0f} KB"
        told += f"; the adapter takes {shown}"
    return told
