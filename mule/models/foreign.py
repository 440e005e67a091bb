"""Names and shapes of other people's state dicts, read as one of our families. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mule.errors import ModelError
from mule.models.config import ModelConfig
from mule.models.pickled import Tensor, Unpickled

MAX_LISTED = 10
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_FLOATS = ("float64", "float32", "bfloat16", "float16", *_FLOAT8)
# What wrappers put into a name: DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BACKBONE = ("embed_tokens", "layers", "norm", "rotary_emb")
# Several matrices in one, row after row.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
# Computed anew, or used only by a float8 forward pass: no weights are lost without them.
_NOT_NEEDED = re.compile(r"(rotary_emb\.(inv_freq|\w+_cached)|\.(input|activation|[qkv])_scale)$")
_SCALES = ("weight_scale_inv", "weight_scale")
_ARCHITECTURES = {
    r"(^|\.)(wte|wpe)\.weight$|(^|\.)h\.\d+\.attn\.c_attn\.": "GPT-2 or nanoGPT",
    r"(^|\.)h\.\d+\.(attn\.(attn|qkv)|self_attention)\.": "LitGPT, Bloom or Falcon",
    r"gpt_neox\.|\.attention\.query_key_value\.": "GPT-NeoX or Pythia",
    r"tok_embeddings\.|\.attention\.wq\.": "Llama in Meta's own layout, before Hugging Face's",
    r"\.experts\.|block_sparse_moe": "a mixture of experts",
    r"\.(mixer|mamba)\.(in_proj|A_log)": "Mamba",
    r"lora_[AB]\.|lora_embedding": "a LoRA adapter",
    r"\.(qweight|qzeros|SCB|absmax)(\.|$)": "quantised integers (GPTQ, AWQ, bitsandbytes)",
}


@dataclass(frozen=True)
class Part:
    """Where a weight comes from: the rows `start:stop` of a stored tensor, times its scale."""

    source: str
    start: int
    stop: int
    scale: str | None = None


@dataclass(frozen=True)
class Foreign:
    """A state dict under our names: name -> stored tensor; the scales apart; what is not needed."""

    stored: Mapping[str, Tensor]
    weights: Mapping[str, str]
    scales: Mapping[str, str]
    not_needed: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the tensor of our name `name`, if there is one."""
        return self.stored[self.weights[name]].shape if name in self.weights else None


def read_names(found: Unpickled) -> Foreign:
    """Undo prefixes and wrappers. Raises ModelError when the architecture is not one of ours."""
    weights: dict[str, str] = {}
    scales: dict[str, str] = {}
    not_needed = []
    for name, stored in found.names().items():
        ours = canonical(name)
        if _NOT_NEEDED.search(ours):
            not_needed.append(name)
            continue
        target, key = weights, ours
        for suffix in _SCALES:
            if ours.endswith(f".{suffix}"):
                target, key = scales, ours.removesuffix(suffix) + "weight"
        if key in target and not _same(found.tensors, target[key], stored):
            raise ModelError(
                f"{name} and {target[key]} are both {ours} without their prefixes, and differ",
                "save one model: torch.save(model.state_dict(), FILE)",
            )
        target[key] = stored
    _refuse_architecture(weights)
    return Foreign(found.tensors, weights, scales, tuple(not_needed))


def canonical(name: str) -> str:
    """`name` without what wrappers add, in any order, and with one `model.` where it belongs."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[:1] == ["model"]:
        parts = parts[1:]
    return ".".join(["model", *parts] if parts[:1] and parts[0] in _BACKBONE else parts)


def _same(stored: Mapping[str, Tensor], one: str, other: str) -> bool:
    return stored[one] == stored[other]


def _refuse_architecture(weights: Mapping[str, str]) -> None:
    for pattern, architecture in _ARCHITECTURES.items():
        hits = [name for name in weights if re.search(pattern, name)]
        if hits:
            raise ModelError(
                f"holds {architecture}, which mule convert does not read:{_listed(hits)}",
                "merge it where it was trained, then convert the merged model"
                if "LoRA" in architecture
                else "convert a model with the names of transformers' llama or qwen3",
            )
    if not any(name.startswith("model.layers.") for name in weights):
        raise ModelError(
            f"no tensor is called model.layers.0...; there are:{_listed(list(weights))}",
            "convert a model with the names of transformers' llama or qwen3",
        )


# ---------------------------------------------------------------- the shape the tensors tell


def inferred(foreign: Foreign) -> dict[str, Any]:
    """What the tensors tell of the model's shape, by the recipe's names; heads only with QK-norm."""
    known: dict[str, Any] = {}
    if embedding := foreign.shape("model.embed_tokens.weight"):
        known["vocab_size"], known["hidden_size"] = embedding[0], embedding[-1]
    numbers = [re.match(r"model\.layers\.(\d+)\.", name) for name in foreign.weights]
    known["num_layers"] = len({number[1] for number in numbers if number})
    if gate := foreign.shape("model.layers.0.mlp.gate_proj.weight"):
        known["intermediate_size"] = gate[0]
    elif gate_up := foreign.shape("model.layers.0.mlp.gate_up_proj.weight"):
        known["intermediate_size"] = gate_up[0] // 2
    head_norm = foreign.shape("model.layers.0.self_attn.q_norm.weight")
    known["family"] = "qwen3" if head_norm else "llama"
    known["tie_embeddings"] = _is_tied(foreign)
    return known | ({"head_dim": head_norm[0]} if head_norm else {})


def query_rows(foreign: Foreign) -> int:
    """num_heads x head_dim, as the projections of the first layer tell; 0 when they do not."""
    q = foreign.shape("model.layers.0.self_attn.q_proj.weight")
    o = foreign.shape("model.layers.0.self_attn.o_proj.weight")
    return q[0] if q else o[-1] if o else 0


def inferred_heads(foreign: Foreign, given: Mapping[str, Any]) -> dict[str, int]:
    """num_heads, num_kv_heads and head_dim from any one of them and the projections' rows."""
    k = foreign.shape("model.layers.0.self_attn.k_proj.weight")
    fused = foreign.shape("model.layers.0.self_attn.qkv_proj.weight")
    q_rows = query_rows(foreign)
    kv_rows = k[0] if k else (fused[0] - q_rows) // 2 if fused else 0
    head_dim = given.get("head_dim") or q_rows // given.get("num_heads", q_rows + 1)
    if not head_dim or q_rows % head_dim or kv_rows % head_dim:
        return {}
    return {
        "head_dim": head_dim,
        "num_heads": q_rows // head_dim,
        "num_kv_heads": kv_rows // head_dim,
    }


def _is_tied(foreign: Foreign) -> bool:
    head = foreign.weights.get("lm_head.weight")
    embedding = foreign.weights.get("model.embed_tokens.weight")
    return head is None or (embedding is not None and _same(foreign.stored, head, embedding))


# ---------------------------------------------------------------- fitting the config


def expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The weights of a model folder, by transformers' names, with their shapes."""
    c = config
    layer = _matrices(c) | {f"{name}.weight": (size,) for name, size in _norms(c).items()}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size)
    }
    for number in range(c.num_layers):
        shapes |= {f"model.layers.{number}.{name}": layer[name] for name in layer}
    shapes["model.norm.weight"] = (c.hidden_size,)
    head = {"lm_head.weight": (c.vocab_size, c.hidden_size)}
    return shapes if c.tie_embeddings else shapes | head


def _matrices(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The linear layers of a block, with their biases."""
    query, kv, hidden = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size
    qkv = {"q_proj": query, "k_proj": kv, "v_proj": kv}
    inner = {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
    if c.fused_projections:
        qkv, inner = {"qkv_proj": query + 2 * kv}, {"gate_up_proj": 2 * c.intermediate_size}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, rows, columns, bias in (
        ("self_attn", qkv, hidden, c.qkv_bias),
        ("self_attn", {"o_proj": hidden}, query, c.o_bias),
        ("mlp", inner, hidden, c.mlp_bias),
        ("mlp", {"down_proj": hidden}, c.intermediate_size, c.mlp_bias),
    ):
        for name, size in rows.items():
            shapes[f"{part}.{name}.weight"] = (size, columns)
            if bias:
                shapes[f"{part}.{name}.bias"] = (size,)
    return shapes


def _norms(c: ModelConfig) -> dict[str, int]:
    """The norms of a block."""
    names = ["input_layernorm", "post_attention_layernorm"]
    if c.sandwich_norms:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    heads = ["self_attn.q_norm", "self_attn.k_norm"] if c.qk_norm else []
    return dict.fromkeys(names, c.hidden_size) | dict.fromkeys(heads, c.head_dim)


def fit(foreign: Foreign, config: ModelConfig) -> dict[str, Part]:
    """Where each weight of `config` comes from.

    Raises ModelError, listing every tensor that is missing, not expected or of another shape.
    """
    wanted = expected(config)
    parts: dict[str, Part] = {}
    wrong: list[str] = []
    used: set[str] = set()
    for name, stored in foreign.weights.items():
        targets = [name] if name in wanted else _targets(name)
        if config.tie_embeddings and name == "lm_head.weight" and _is_tied(foreign):
            continue
        shapes = [wanted[target] for target in targets if target in wanted]
        if len(shapes) < len(targets):
            wrong.append(f"{name}: {foreign.stored[stored].shape}, not in this model")
            continue
        if used & set(targets):
            wrong.append(f"{name}: there both in one piece and apart")
        used |= set(targets)
        rows = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if foreign.stored[stored].shape != rows:
            wrong.append(f"{name}: {foreign.stored[stored].shape}, the config says {rows}")
        elif foreign.stored[stored].dtype not in _FLOATS:
            wrong.append(f"{name}: {foreign.stored[stored].dtype}, not a type for weights")
        parts |= _cut(targets, shapes, stored, foreign.scales.get(name))
    wrong += [f"{name}: missing" for name in wanted if name not in used]
    wrong += list(_idle_scales(foreign))
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors do not fit:{_listed(wrong)}",
            "give the config.json of this very model: --config FILE, or its shape: --like FOLDER",
        )
    return {name: parts[name] for name in wanted}


def _targets(name: str) -> list[str]:
    """The weights that a stored name holds: several for a fused matrix."""
    for fused, single in _FUSED.items():
        for kind in ("weight", "bias"):
            if name.endswith(f".{fused}.{kind}"):
                before = name.removesuffix(f"{fused}.{kind}")
                return [f"{before}{one}.{kind}" for one in single]
    return [name]


def _cut(
    targets: list[str], shapes: list[tuple[int, ...]], stored: str, scale: str | None
) -> Iterator[tuple[str, Part]]:
    start = 0
    for target, shape in zip(targets, shapes, strict=True):
        yield target, Part(stored, start, start + shape[0], scale)
        start += shape[0]


def _idle_scales(foreign: Foreign) -> Iterator[str]:
    for name, scale in foreign.scales.items():
        stored = foreign.weights.get(name)
        if stored is None or foreign.stored[stored].dtype not in _FLOAT8:
            yield f"{scale}: a scale without a float8 weight beside it"


def _listed(names: list[str]) -> str:
    """The first names, one on a line."""
    more = [f"and {len(names) - MAX_LISTED:,} more"] if len(names) > MAX_LISTED else []
    return "".join(f"\n  {name}" for name in names[:MAX_LISTED] + more)
