"""What is known of a family and of one of its models, in the terms of llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from gguf.constants import MODEL_ARCH, Keys

from mule.export.rope import DEFAULT_THETA, Rope, Value

# A weight below `model.layers.N.`, with its shape in the words of ModelShape, or in numbers.
Words = Mapping[str, tuple[str | int, ...]]

SILU = {"hidden_act": "silu"}
NO_WINDOW = {"use_sliding_window": False}
# Scalings of RoPE: every architecture has these, some read tensors of factors too.
SCALINGS = frozenset({"default", "linear", "yarn"})
ALL_SCALINGS = SCALINGS | {"llama3", "longrope"}
NORMS: Words = {"input_layernorm": ("hidden",), "post_attention_layernorm": ("hidden",)}
ATTENTION: Words = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("key", "hidden"),
    "self_attn.v_proj": ("key", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
}
QK_NORMS: Words = {"self_attn.q_norm": ("head_dim",), "self_attn.k_norm": ("head_dim",)}
QKV_BIAS = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_BARE = ("bias", "A_log", "D", "dt_bias")  # ends of names that are not followed by .weight


@dataclass(frozen=True)
class Part:
    """Rows of a folder's weight that a tensor of the file takes; of a vector they are its numbers."""

    source: str
    first: int
    count: int


@dataclass(frozen=True)
class Stack:
    """A tensor of the file that is not one weight of the folder: its rows, and its shape."""

    parts: tuple[Part, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Experts:
    """A mixture of `count` experts, `used` a token, each `ffn` wide, in some `layers`.

    `shared`: the width of the one that every token passes; 0: there is none.
    """

    count: int
    used: int
    ffn: int
    layers: frozenset[int]
    shared: int = 0


@dataclass(frozen=True)
class Recurrence:
    """State-space mixers in some `layers`: `inner` channels, of which each has `state` numbers.

    `steps` are the time steps a token: the heads of Mamba-2, the rank they pass in Mamba-1.
    """

    layers: frozenset[int]
    inner: int
    state: int
    steps: int
    conv_kernel: int
    groups: int = 0  # that share B and C; 0: Mamba-1

    @property
    def conv(self) -> int:
        """Channels that pass the convolution."""
        return self.inner + 2 * self.groups * self.state

    @property
    def doubled(self) -> int:
        """Rows of Mamba-1's in_proj."""
        return 2 * self.inner

    @property
    def projected(self) -> int:
        """Rows of Mamba-2's in_proj: z, x, B, C and the time steps."""
        return self.inner + self.conv + self.steps

    @property
    def step_inputs(self) -> int:
        """Rows of Mamba-1's x_proj: the time step, B and C."""
        return self.steps + 2 * self.state

    def entries(self) -> dict[str, Value]:
        """What the file says of it."""
        found: dict[str, Value] = {
            Keys.SSM.CONV_KERNEL: self.conv_kernel,
            Keys.SSM.INNER_SIZE: self.inner,
            Keys.SSM.STATE_SIZE: self.state,
            Keys.SSM.TIME_STEP_RANK: self.steps,
        }
        if self.groups:
            found[Keys.SSM.GROUP_COUNT] = self.groups
        return found


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
    experts: Experts | None = None
    ssm: Recurrence | None = None
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

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The blocks that attend; the others have a recurrence in its place."""
        recurrent = self.ssm.layers if self.ssm else frozenset()
        return tuple(layer for layer in range(self.layers) if layer not in recurrent)

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer in self.experts.layers

    def sizes(self, words: tuple[str | int, ...]) -> tuple[int, ...]:
        """A shape in numbers."""
        return tuple(w if isinstance(w, int) else attrgetter(w)(self) for w in words)


@dataclass(frozen=True)
class Family:
    """How one transformers `model_type` maps to llama.cpp.

    `permuted`: the rows of q and k are interleaved, as llama.cpp's own RoPE turns neighbours.
    `layer`: the weights of a block, or of the block of a number where they differ.
    `stacks`: the tensors of a block, by their names behind `blk.N.`, that are not weights of the
    folder one by one; their sources come without `model.layers.N.`.
    `required`: keys of config.json with the only value that llama.cpp computes.
    `always_biased`: the layers named in `biases` have one in every model of the family.
    `norm_offset` is added to norm weights: Gemma saves them less one.
    `partial`: a part of each head may stay unturned. `turned`: none of it ever turns if not.
    `fields` reads what else a ModelShape has; `more` adds keys and notes to one. Both raise
    ValueError with what cannot be computed.
    """

    arch: MODEL_ARCH
    permuted: bool
    layer: Words | Callable[[ModelShape, int], Words]
    stacks: Callable[[ModelShape, int], dict[str, Stack]] | None = None
    biases: frozenset[str] = frozenset()
    always_biased: bool = False
    required: dict[str, Any] = field(default_factory=dict)
    scalings: frozenset[str] = SCALINGS
    partial: bool = False
    turned: bool = True
    norm_offset: float = 0.0
    default_theta: float = DEFAULT_THETA
    last_norm: str = "model.norm"
    fields: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    more: Callable[[dict[str, Any], ModelShape], None] | None = None

    def words(self, shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
        """The weights of a block, by their names behind `model.layers.N.`, with their shapes."""
        words = self.layer(shape, layer) if callable(self.layer) else self.layer
        bare = {name: name.rpartition(".")[2] in _BARE for name in words}
        return {
            name if bare[name] else f"{name}.weight": shape.sizes(sizes)
            for name, sizes in words.items()
        }

    def stacked(self, shape: ModelShape, layer: int) -> dict[str, Stack]:
        """The stacks of a block, by their whole names in the file, with whole names of sources."""
        found = self.stacks(shape, layer) if self.stacks else {}
        place = f"model.layers.{layer}."
        return {
            f"blk.{layer}.{name}": Stack(
                tuple(Part(f"{place}{p.source}", p.first, p.count) for p in stack.parts),
                stack.shape,
            )
            for name, stack in found.items()
        }


def granite_scales(raw: dict[str, Any], shape: ModelShape) -> None:
    """Granite's four multipliers."""
    shape.keys[Keys.Attention.SCALE] = float(raw.get("attention_multiplier", 1.0))
    shape.keys[Keys.LLM.EMBEDDING_SCALE] = float(raw.get("embedding_multiplier", 1.0))
    shape.keys[Keys.LLM.RESIDUAL_SCALE] = float(raw.get("residual_multiplier", 1.0))
    shape.keys[Keys.LLM.LOGIT_SCALE] = float(raw.get("logits_scaling", 1.0))
