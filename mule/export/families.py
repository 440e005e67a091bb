"""What llama.cpp must be told of each family: a new one is an entry of FAMILIES."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import MODEL_ARCH

from mule import fsio
from mule.errors import ModelError

# A weight below `model.layers.N.`, with its shape in the words of ModelShape.
_Words = dict[str, tuple[str, ...]]
_NORMS: _Words = {"input_layernorm": ("hidden",), "post_attention_layernorm": ("hidden",)}
_ATTENTION: _Words = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("key", "hidden"),
    "self_attn.v_proj": ("key", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
}
_MLP: _Words = {
    "mlp.gate_proj": ("ffn", "hidden"),
    "mlp.up_proj": ("ffn", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
}
_QK_NORMS: _Words = {"self_attn.q_norm": ("head_dim",), "self_attn.k_norm": ("head_dim",)}
_QKV_BIAS = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})


@dataclass(frozen=True)
class Family:
    """How one transformers `model_type` maps to llama.cpp.

    `permuted`: the rows of q and k are interleaved, as llama.cpp's own RoPE turns neighbours.
    `required`: keys of config.json with the only value that llama.cpp computes.
    """

    arch: MODEL_ARCH
    permuted: bool
    layer: _Words
    biases: frozenset[str]
    required: dict[str, Any]


FAMILIES = {
    "llama": Family(
        arch=MODEL_ARCH.LLAMA,
        permuted=True,
        layer=_NORMS | _ATTENTION | _MLP,
        biases=frozenset(_ATTENTION) | frozenset(_MLP),
        required={"hidden_act": "silu"},
    ),
    "qwen3": Family(
        arch=MODEL_ARCH.QWEN3,
        permuted=False,
        layer=_NORMS | _ATTENTION | _QK_NORMS | _MLP,
        biases=_QKV_BIAS,
        required={"hidden_act": "silu", "use_sliding_window": False},
    ),
}


@dataclass(frozen=True)
class ModelShape:
    """The numbers of config.json that the file needs; `rope` are its scaling parameters."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    rope_theta: float
    rope: dict[str, Any]
    tied: bool | None  # None: config.json does not say, the weights do

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim


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
        return family, _shape(file, raw)
    except KeyError as error:
        raise ModelError(
            f"{file}: no {error}", "download the model again, or restore the key"
        ) from None


def _require(file: Path, raw: dict[str, Any], family: Family) -> None:
    for key, value in family.required.items():
        if raw.get(key, value) != value:
            raise ModelError(
                f"{file}: {key} = {raw[key]!r}, and llama.cpp computes only {value!r}",
                "this model cannot be run from a GGUF file",
            )
    if raw.get("quantization_config"):
        raise ModelError(
            f"{file}: its weights are already quantised",
            "export the model that was quantised; merge an adapter into it first (mule merge)",
        )


def _shape(file: Path, raw: dict[str, Any]) -> ModelShape:
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ModelError(
            f"{file}: RoPE scaling {rope['rope_type']!r} cannot be written as GGUF",
            "use a model with rope_type default, linear or llama3",
        )
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(
            f"{file}: partial_rotary_factor is set, and llama.cpp turns every channel",
            "this model cannot be run from a GGUF file",
        )
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    return ModelShape(
        layers=raw["num_hidden_layers"],
        hidden=hidden,
        ffn=raw["intermediate_size"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        vocab=raw["vocab_size"],
        context=raw["max_position_embeddings"],
        norm_eps=raw["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        rope=rope,
        tied=raw.get("tie_word_embeddings"),
    )


def expected_weights(family: Family, shape: ModelShape, found: set[str]) -> dict[str, tuple]:
    """Names and shapes of every weight to write, biases and head as far as they are `found`.

    Raises ModelError when one is missing, or one is there that the family does not know.
    """
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, shape.hidden)
    }
    for layer in range(shape.layers):
        for name, words in family.layer.items():
            sizes = tuple(getattr(shape, word) for word in words)
            place = f"model.layers.{layer}.{name}"
            expected[f"{place}.weight"] = sizes
            if name in family.biases and f"{place}.bias" in found:
                expected[f"{place}.bias"] = sizes[:1]
    expected["model.norm.weight"] = (shape.hidden,)
    if shape.tied is False or (shape.tied is None and "lm_head.weight" in found):
        expected["lm_head.weight"] = (shape.vocab, shape.hidden)
    _require_names(set(expected), found)
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
    """Rows of q or k: from the two halves of each head to neighbouring pairs.

    Source: LlamaModel.permute in llama.cpp's conversion/llama.py.
    """
    rows = weight.shape[0] // num_heads
    split = weight.reshape(num_heads, 2, rows // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def rope_factors(shape: ModelShape) -> npt.NDArray[np.float32] | None:
    """What llama.cpp divides each RoPE frequency by (head_dim / 2,); None without llama3 scaling.

    Source: _compute_llama3_parameters in transformers' modeling_rope_utils.py.
    """
    if shape.rope["rope_type"] != "llama3":
        return None
    factor, original = shape.rope["factor"], shape.rope["original_max_position_embeddings"]
    low, high = shape.rope["low_freq_factor"], shape.rope["high_freq_factor"]
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    wavelengths = 2 * math.pi * shape.rope_theta**exponents
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
