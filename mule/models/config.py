"""The shape of a decoder, and the named sizes. No torch here: `plan` reads this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mule.errors import ModelError

RopeKind = Literal["linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained on.

    Names follow `rope_parameters` of transformers; None: not given, so the kind's own default.
    """

    kind: RopeKind
    factor: float | None = None
    original_max_position_embeddings: int | None = None  # llama3, yarn, longrope
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    attention_factor: float | None = None  # yarn, longrope
    short_factor: tuple[float, ...] = ()  # longrope, one for each pair of channels
    long_factor: tuple[float, ...] = ()  # longrope


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of the feed-forward layer: what decides weights and arithmetic.

    How it is trained (balancing, capacity) is `Routing`: an exported model does not know of it.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    shared_intermediate_size: int = 0  # of an expert that every token passes; 0: there is none
    renormalize: bool = True  # the weights of the chosen experts add up to 1
    layers: tuple[int, ...] | None = None  # blocks that have experts; None: all

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ModelError(
                f"{self.experts_per_token} experts a token of {self.num_experts} in all",
                "set model.moe.experts_per_token between 1 and model.moe.num_experts",
            )


@dataclass(frozen=True)
class Routing:
    """How a mixture of experts is trained; evaluation, decoding and exports are always dropless.

    Sources: Fedus et al. 2021, equations 4-6 (auxiliary loss, capacity); Zoph et al. 2022, equation 5
    (z-loss); Wang et al. 2024, algorithm 1 (a bias in place of a loss).
    """

    balance: Literal["aux", "bias", "none"] = "aux"
    aux_loss: float = 0.01  # weight of the auxiliary loss, with balance aux
    z_loss: float = 0.001  # weight of the squared log-sum-exp of the router's logits
    bias_rate: float = 0.001  # step of the bias after an update, with balance bias
    capacity_factor: float | None = None  # an expert takes factor * T * k / E tokens; None: all
    overflow: Literal["drop", "reroute"] = "drop"  # what exceeds it, the lightest tokens first


@dataclass(frozen=True)
class MambaConfig:
    """A state-space layer in place of attention.

    mamba2: `num_heads` heads of `head_dim` channels, one decay each, B and C shared by `num_groups`
    (Dao and Gu 2024). mamba1: `num_heads` channels of 1, a decay for each state (Gu and Dao 2023),
    their steps through a bottleneck of `dt_rank`.
    """

    kind: Literal["mamba1", "mamba2"]
    state_size: int
    num_heads: int
    head_dim: int = 1
    num_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 128  # tokens that are computed as one matrix; mamba2
    dt_rank: int = 0  # mamba1
    conv_bias: bool = True
    proj_bias: bool = False
    inner_norms: bool = False  # RMSNorms on dt, B and C, as in Jamba; mamba1

    @property
    def inner_size(self) -> int:
        """Channels inside the layer."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels that pass the convolution: with mamba2 x, B and C, else x alone."""
        shared = 2 * self.num_groups * self.state_size if self.kind == "mamba2" else 0
        return self.inner_size + shared


@dataclass(frozen=True)
class ModelConfig:
    """What determines a decoder's weights and arithmetic; names follow transformers' config.json."""

    family: str  # transformers' model_type; the file of that name in families/ maps both ways
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # = num_heads: MHA; 1: MQA; between: GQA
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False
    tie_embeddings: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    fused_projections: bool = False  # one matrix for q, k and v, and one for gate and up
    norm_plus_one: bool = False  # norms multiply by 1 + weight
    sandwich_norms: bool = False  # a norm behind attention and the MLP too
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and the MLP add
    attention_scale: float | None = None  # None: head_dim ** -0.5
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits become cap * tanh(logits / cap)
    sliding_window: int | None = None  # tokens that the sliding layers see, itself included
    sliding_layers: tuple[int, ...] = ()
    nope_layers: tuple[int, ...] = ()  # without rotary positions
    rope_local_theta: float | None = None  # of the sliding layers, without scaling
    rotary_dim: int | None = None  # channels of a head that turn; None: all
    rope_scaling: RopeScaling | None = None
    moe: MoEConfig | None = None
    mamba: MambaConfig | None = None
    mamba_layers: tuple[int, ...] = ()  # blocks that have it in place of attention

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ModelError(
                    f"{name} is {getattr(self, name)}", f"set model.{name} to 1 or more"
                )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads",
                "choose model.num_kv_heads that divides model.num_heads",
            )
        if self.head_dim % 2:
            raise ModelError(
                f"head_dim {self.head_dim} is odd; rotary positions turn pairs of channels",
                "choose an even model.head_dim",
            )

    def has_experts(self, layer: int) -> bool:
        """Whether a block's feed-forward layer is a mixture of experts."""
        return self.moe is not None and (self.moe.layers is None or layer in self.moe.layers)

    def has_mamba(self, layer: int) -> bool:
        """Whether a block's mixer is a state-space layer, not attention."""
        return layer in self.mamba_layers

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The blocks that attend, and so have keys and values to keep."""
        return tuple(i for i in range(self.num_layers) if i not in self.mamba_layers)

    @property
    def fused_mlp(self) -> bool:
        """Whether gate and up are one matrix, as in the files of Granite's mixtures."""
        return self.fused_projections or self.family in ("granitemoeshared", "granitemoehybrid")

    @property
    def turned_dim(self) -> int:
        """Channels of a head that rotary positions turn."""
        return self.rotary_dim or self.head_dim


@dataclass(frozen=True)
class NamedSize:
    """A shape with a name: hidden, layers, heads, key/value heads, feed-forward width."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    purpose: str
    head_dim: int = 64


# Widths are multiples of 256, which K-quants need. From 25m up the name counts all parameters at a
# vocabulary of 32,768, below that at 4,096: with 32k tokens the embedding alone would exceed them.
SIZES: dict[str, NamedSize] = {
    "1m": NamedSize(128, 4, 2, 2, 256, "smoke tests; too narrow for K-quants"),
    "2m": NamedSize(256, 2, 4, 2, 512, "tests that train"),
    "5m": NamedSize(256, 5, 4, 2, 768, "the demo; facts and short answers"),
    "10m": NamedSize(256, 12, 4, 2, 768, "books in half an hour on a laptop"),
    "25m": NamedSize(512, 4, 8, 2, 1024, "the benchmark's small shape"),
    "50m": NamedSize(512, 12, 8, 2, 1536, "stories; an evening on a CPU"),
    "125m": NamedSize(768, 16, 12, 4, 2048, "GPT-2 small's class"),
    "350m": NamedSize(1024, 28, 16, 4, 2816, "one GPU, a day"),
    "1b": NamedSize(2048, 21, 32, 8, 5632, "several GPUs"),
}


def named_size(name: str) -> NamedSize:
    """The shape called `name`; ModelError lists the names when there is none."""
    if name not in SIZES:
        raise ModelError(
            f"no size is called {name!r}", f"choose model.size among {', '.join(SIZES)}"
        )
    return SIZES[name]
