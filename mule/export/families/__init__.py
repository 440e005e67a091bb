"""What llama.cpp must be told of each family: a new one is an entry of FAMILIES."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mule import fsio
from mule.errors import ModelError
from mule.export.families.dense import DENSE
from mule.export.families.experts import GRANITE_MOE_SHARED, QWEN3_MOE
from mule.export.families.recurrent import GRANITE_HYBRID, JAMBA
from mule.export.families.shape import Family, ModelShape, Part
from mule.export.rope import read_rope
from mule.generate.weight_rows import interleaved

__all__ = ["FAMILIES", "Family", "ModelShape", "Part", "expected_weights", "interleave_heads"]

FAMILIES = {
    **DENSE,
    "qwen3_moe": QWEN3_MOE,
    "granitemoeshared": GRANITE_MOE_SHARED,
    "granitemoehybrid": GRANITE_HYBRID,
    "jamba": JAMBA,
}
_HOPELESS = "this model cannot be run from a GGUF file"


def read_shape(model_dir: Path) -> tuple[Family, ModelShape]:
    """The family and the numbers of a model folder.

    Raises ModelError for a family, a scaling of RoPE or a setting that cannot be written.
    """
    file = model_dir / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{model_dir}: not a model folder (no config.json)",
            "give a folder with config.json, tokenizer.json and model.safetensors",
        )
    raw = fsio.read_json(file)
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(
            f"{file}: model_type {kind!r} cannot be written as GGUF",
            f"use a model of one of these: {', '.join(FAMILIES)}",
        )
    family = FAMILIES[kind]
    _require(file, raw, family)
    try:
        shape = _shape(file, raw, family)
        _long_factors(shape)
        if family.more is not None:
            family.more(raw, shape)
    except KeyError as error:
        raise ModelError(
            f"{file}: no {error}", "download the model again, or restore the key"
        ) from None
    except ValueError as error:
        raise ModelError(f"{file}: {error}", _HOPELESS) from None
    return family, shape


def _long_factors(shape: ModelShape) -> None:
    """transformers chooses the factors by the length of the text, llama.cpp by its context."""
    original = shape.rope.original_context
    if shape.rope.kind == "longrope" and original < shape.context:
        shape.reach.append(original)
        shape.notes.append(
            f"opened with a context above {original:,} tokens, llama.cpp uses the factors for long "
            "texts from the first token, the model only beyond: short answers differ"
        )


def _require(file: Path, raw: dict[str, Any], family: Family) -> None:
    for key, value in family.required.items():
        if raw.get(key, value) != value:
            raise ModelError(
                f"{file}: {key} = {raw[key]!r}, and llama.cpp computes only {value!r}", _HOPELESS
            )
    if raw.get("quantization_config"):
        raise ModelError(
            f"{file}: its weights are already quantised",
            "export the model that was quantised; merge an adapter into it first (mule merge)",
        )


def _shape(file: Path, raw: dict[str, Any], family: Family) -> ModelShape:
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    head_dim = raw.get("head_dim") or hidden // heads
    rope = read_rope(file, raw, head_dim, family.scalings, family.default_theta)
    if rope.dim != head_dim and not family.partial:
        raise ModelError(
            f"{file}: partial_rotary_factor is set, and llama.cpp turns every channel", _HOPELESS
        )
    if not family.turned:
        rope = dataclasses.replace(rope, dim=0)
    fields: dict[str, Any] = {
        "layers": raw["num_hidden_layers"],
        "hidden": hidden,
        "ffn": raw.get("intermediate_size"),
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "vocab": raw["vocab_size"],
        "context": raw["max_position_embeddings"],
        "norm_eps": raw["rms_norm_eps"],
        "rope": rope,
        "tied": raw.get("tie_word_embeddings"),
    }
    fields |= family.fields(raw) if family.fields else {}
    if fields["ffn"] is None:
        raise KeyError("intermediate_size")
    return ModelShape(**fields)


def expected_weights(family: Family, shape: ModelShape, found: set[str]) -> dict[str, tuple]:
    """Names and shapes of every weight to write, biases and head as far as they are `found`.

    Raises ModelError when one is missing, or one is there that the family does not know.
    """
    expected = weight_shapes(family, shape, found)
    _require_names(set(expected), found)
    return expected


def weight_shapes(
    family: Family, shape: ModelShape, found: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """The same, whatever else is `found` or is not."""
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, shape.hidden)
    }
    for layer in range(shape.layers):
        for name, sizes in family.words(shape, layer).items():
            place = f"model.layers.{layer}.{name}"
            expected[place] = sizes
            bias = f"{place.removesuffix('.weight')}.bias"
            biased = name.removesuffix(".weight") in family.biases
            if biased and (family.always_biased or bias in found):
                expected[bias] = sizes[:1]
    expected[f"{family.last_norm}.weight"] = (shape.hidden,)
    if shape.tied is False or (shape.tied is None and "lm_head.weight" in found):
        expected["lm_head.weight"] = (shape.vocab, shape.hidden)
    return expected


def _require_names(expected: set[str], found: set[str]) -> None:
    if missing := sorted(expected - found):
        raise ModelError(
            f"{len(missing)} weights are missing, first {missing[0]}",
            "the files do not fit config.json; download or save the model again",
        )
    ignored = {"lm_head.weight"}  # a tied head that was saved all the same
    extra = sorted(
        name for name in found - expected - ignored if not name.endswith("rotary_emb.inv_freq")
    )
    if extra:
        raise ModelError(
            f"{len(extra)} weights have no place in a GGUF file, first {extra[0]}",
            "merge an adapter first (mule merge); remove prefixes such as `module.`",
        )


def interleave_heads(weight: npt.NDArray, num_heads: int) -> npt.NDArray:
    """Rows of q or k: from the two halves of each head to neighbouring pairs."""
    return weight[interleaved(len(weight), num_heads)]
