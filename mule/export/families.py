"""What llama.cpp must be told of each family: a new one is an entry of FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
from gguf.constants import MODEL_ARCH, Keys

from mule import fsio
from mule.errors import ModelError
from mule.export.rope import DEFAULT_THETA, Rope, Value, read_rope
from mule.generate.weight_rows import interleaved

# A weight below `model.layers.N.`, with its shape in the words of ModelShape.
_Words = dict[str, tuple[str, ...]]
_NORMS: _Words = {"input_layernorm": ("hidden",), "post_attention_layernorm": ("hidden",)}
_FEEDFORWARD_NORMS: _Words = {
    "pre_feedforward_layernorm": ("hidden",),
    "post_feedforward_layernorm": ("hidden",),
}
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
_FUSED: _Words = {
    "self_attn.qkv_proj": ("query_key_value", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "mlp.gate_up_proj": ("gate_up", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
}
_QK_NORMS: _Words = {"self_attn.q_norm": ("head_dim",), "self_attn.k_norm": ("head_dim",)}
_QKV_BIAS = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_ALL_BIASES = frozenset(_ATTENTION) | frozenset(_MLP)
_SILU = {"hidden_act": "silu"}
_NO_WINDOW = {"use_sliding_window": False}
# Scalings of RoPE: every architecture has these, some read tensors of factors too.
_SCALINGS = frozenset({"default", "linear", "yarn"})
_ALL_SCALINGS = _SCALINGS | {"llama3", "longrope"}
_NOPE_STEP = 4  # SmolLM3 in llama.cpp: every fourth layer is not turned
_GEMMA_PERIOD = 6  # Gemma 3 in llama.cpp: every sixth layer sees all tokens
_GEMMA_27B_LAYERS = 62  # of which llama.cpp knows another query scale


@dataclass(frozen=True)
class ModelShape:
    """The numbers of config.json that the file needs.

    `keys` are further entries of the file; `notes` say where llama.cpp cannot follow the model, and
    `reach` up to how many tokens it can.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    rope: Rope
    tied: bool | None  # None: config.json does not say, the weights do
    keys: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reach: list[int] = field(default_factory=list)

    @property
    def exact_context(self) -> int:
        """The longest context in which llama.cpp computes what the model does."""
        return min(self.context, *self.reach) if self.reach else self.context

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def query_key_value(self) -> int:
        return self.query + 2 * self.key

    @property
    def gate_up(self) -> int:
        return 2 * self.ffn


@dataclass(frozen=True)
class Family:
    """How one transformers `model_type` maps to llama.cpp.

    `permuted`: the rows of q and k are interleaved, as llama.cpp's own RoPE turns neighbours.
    `required`: keys of config.json with the only value that llama.cpp computes.
    `always_biased`: the layers named in `biases` have one in every model of the family.
    `norm_offset` is added to norm weights: Gemma saves them less one.
    `partial`: a part of each head may stay unturned.
    `more` adds keys and notes to a shape, or raises ValueError with what cannot be computed.
    """

    arch: MODEL_ARCH
    permuted: bool
    layer: _Words
    biases: frozenset[str] = frozenset()
    always_biased: bool = False
    required: dict[str, Any] = field(default_factory=dict)
    scalings: frozenset[str] = _SCALINGS
    partial: bool = False
    norm_offset: float = 0.0
    default_theta: float = DEFAULT_THETA
    more: Callable[[dict[str, Any], ModelShape], None] | None = None


def _gemma(raw: dict[str, Any], shape: ModelShape) -> None:
    """Source: Gemma3TextConfig of transformers; src/models/gemma3.cpp of llama.cpp."""
    period = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", _GEMMA_PERIOD))
    wanted = [bool((layer + 1) % period) for layer in range(shape.layers)]
    if kinds := raw.get("layer_types"):
        wanted = [kind == "sliding_attention" for kind in kinds[: shape.layers]]
    if any(wanted):
        _gemma_windows(raw, shape, wanted)
    if softcap := raw.get("final_logit_softcapping"):
        shape.keys[Keys.LLM.FINAL_LOGIT_SOFTCAPPING] = float(softcap)
    scalar = raw.get("query_pre_attn_scalar", 256)
    used = shape.hidden / shape.heads if shape.layers == _GEMMA_27B_LAYERS else shape.head_dim
    if scalar != used:
        raise ValueError(f"query_pre_attn_scalar = {scalar}, and llama.cpp divides by √{used:g}")


def _gemma_windows(raw: dict[str, Any], shape: ModelShape, sliding: list[bool]) -> None:
    if sliding != [bool((layer + 1) % _GEMMA_PERIOD) for layer in range(shape.layers)]:
        raise ValueError(
            f"its layers with a sliding window are not all but every {_GEMMA_PERIOD}th"
        )
    if shape.rope.kind == "yarn":
        raise ValueError("yarn beside sliding windows, whose layers would be scaled too")
    shape.keys[Keys.Attention.SLIDING_WINDOW] = raw.get("sliding_window", 4096)
    shape.keys[Keys.Rope.FREQ_BASE_SWA] = shape.rope.local_theta or DEFAULT_THETA


def _smollm3(raw: dict[str, Any], shape: ModelShape) -> None:
    step = raw.get("no_rope_layer_interval", _NOPE_STEP)
    turned = [int((layer + 1) % step != 0) for layer in range(shape.layers)]
    turned = (raw.get("no_rope_layers") or turned)[: shape.layers]
    if turned != [int((layer + 1) % _NOPE_STEP != 0) for layer in range(shape.layers)]:
        raise ValueError(f"layers without RoPE other than every {_NOPE_STEP}th")


def _granite(raw: dict[str, Any], shape: ModelShape) -> None:
    shape.keys[Keys.Attention.SCALE] = float(raw.get("attention_multiplier", 1.0))
    shape.keys[Keys.LLM.EMBEDDING_SCALE] = float(raw.get("embedding_multiplier", 1.0))
    shape.keys[Keys.LLM.RESIDUAL_SCALE] = float(raw.get("residual_multiplier", 1.0))
    shape.keys[Keys.LLM.LOGIT_SCALE] = float(raw.get("logits_scaling", 1.0))


def _phi3(raw: dict[str, Any], shape: ModelShape) -> None:
    shape.keys[Keys.Rope.SCALING_ORIG_CTX_LEN] = shape.rope.original_context
    shape.keys[Keys.Attention.SLIDING_WINDOW] = raw.get("sliding_window") or 0
    _whole_window(raw, shape)


def _whole_window(raw: dict[str, Any], shape: ModelShape) -> None:
    """llama.cpp sees all tokens where this model sees a window: the same up to its length."""
    window = raw.get("sliding_window")
    if window and window < shape.context:
        shape.reach.append(window)
        shape.notes.append(
            f"attention reaches {window:,} tokens back in the model and all the way in llama.cpp: "
            f"beyond {window:,} tokens the answers differ"
        )


FAMILIES = {
    "llama": Family(
        arch=MODEL_ARCH.LLAMA,
        permuted=True,
        layer=_NORMS | _ATTENTION | _MLP,
        biases=_ALL_BIASES,
        required=_SILU,
        scalings=_ALL_SCALINGS,
    ),
    "mistral": Family(
        arch=MODEL_ARCH.LLAMA,
        permuted=True,
        layer=_NORMS | _ATTENTION | _MLP,
        required=_SILU,
        scalings=_ALL_SCALINGS,
        more=_whole_window,
    ),
    "qwen2": Family(
        arch=MODEL_ARCH.QWEN2,
        permuted=False,
        layer=_NORMS | _ATTENTION | _MLP,
        biases=_QKV_BIAS,
        always_biased=True,
        required=_SILU | _NO_WINDOW,
    ),
    "qwen3": Family(
        arch=MODEL_ARCH.QWEN3,
        permuted=False,
        layer=_NORMS | _ATTENTION | _QK_NORMS | _MLP,
        biases=_QKV_BIAS,
        required=_SILU | _NO_WINDOW,
    ),
    "gemma3_text": Family(
        arch=MODEL_ARCH.GEMMA3,
        permuted=False,
        layer=_NORMS | _FEEDFORWARD_NORMS | _ATTENTION | _QK_NORMS | _MLP,
        required={
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        norm_offset=1.0,
        default_theta=1_000_000.0,
        more=_gemma,
    ),
    "smollm3": Family(
        arch=MODEL_ARCH.SMOLLM3,
        permuted=True,
        layer=_NORMS | _ATTENTION | _MLP,
        biases=_ALL_BIASES,
        required=_SILU | _NO_WINDOW,
        default_theta=2_000_000.0,
        more=_smollm3,
    ),
    "phi3": Family(
        arch=MODEL_ARCH.PHI3,
        permuted=False,
        layer=_NORMS | _FUSED,
        required=_SILU,
        scalings=frozenset({"default", "longrope"}),
        partial=True,
        more=_phi3,
    ),
    "granite": Family(
        arch=MODEL_ARCH.GRANITE,
        permuted=True,
        layer=_NORMS | _ATTENTION | _MLP,
        biases=_ALL_BIASES,
        required=_SILU,
        scalings=_ALL_SCALINGS,
        more=_granite,
    ),
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
    return ModelShape(
        layers=raw["num_hidden_layers"],
        hidden=hidden,
        ffn=raw["intermediate_size"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab=raw["vocab_size"],
        context=raw["max_position_embeddings"],
        norm_eps=raw["rms_norm_eps"],
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
            if name in family.biases and (family.always_biased or f"{place}.bias" in found):
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
    """Rows of q or k: from the two halves of each head to neighbouring pairs."""
    return weight[interleaved(len(weight), num_heads)]
