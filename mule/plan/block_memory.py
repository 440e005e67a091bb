"""What one block keeps of a token between the forward and the backward pass, and its matrices.

Of eager PyTorch; checked against what it allocates by tests/unit/test_memory_plan.py and
tests/unit/test_memory_mixers.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from mule.config.adapter import AdapterSection, LoraSection
from mule.config.schema import TrainSection
from mule.models.config import MambaConfig, ModelConfig
from mule.native import build

Shapes = dict[str, tuple[int, int]]
_NATIVE_CHANNELS = 16  # as mule.models.native_attention
_SCAN_PIECE = 16  # tokens, as mule.models.selective_scan cuts them


def width(precision: str) -> int:
    """Bytes of a number in the forward and backward pass; fp8 exists inside products only."""
    return 4 if precision == "fp32" else 2


def block_bytes(
    c: ModelConfig, layer: int, train: TrainSection, mask_length: int, adapter: AdapterSection
) -> float:
    """Bytes that a block keeps of one token when nothing is computed again.

    What follows a norm keeps its result too; dropout keeps its own.
    """
    size, in_norm = width(str(train.precision)), norm_bytes(adapter)
    norms = (4 if c.sandwich_norms else 2) * (in_norm + size) * c.hidden_size
    if c.mamba is not None and c.has_mamba(layer):
        mixer = _mamba_bytes(c.mamba, size, is_native=_is_native(train))
    else:
        mixer = _attention_bytes(c, size, in_norm, mask_length)
    dropped = 2 * size * c.hidden_size if train.dropout else 0
    beside = _beside_bytes(c, layer, size, adapter)
    return norms + mixer + _feed_forward_bytes(c, layer, size) + dropped + beside


def products_bytes(c: ModelConfig, layer: int, size: int, adapter: AdapterSection) -> float:
    """Bytes of the results of a block's matrix products and attention, for one token."""
    if c.mamba is not None and c.has_mamba(layer):
        mixer = _mamba_products(c.mamba, size) + size * c.hidden_size
    else:
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        mixer = size * (2 * (queries + keys) + c.hidden_size) + 4 * c.num_heads
    products = mixer + size * c.hidden_size + _feed_forward_products(c, layer, size)
    if adapter.kind == "none":
        return products
    beside = adapted_matrices(c, adapter.lora, layer)
    return products + sum(size * (adapter.lora.r + outputs) for _, outputs in beside)


def norm_bytes(adapter: AdapterSection) -> int:
    """What a norm keeps of one value: its input and, where it is trained, the normed one, in fp32."""
    return 8 if adapter.kind == "none" else 4


def adapted_matrices(
    config: ModelConfig, lora: LoraSection, layer: int
) -> Iterator[tuple[int, int]]:
    """Inputs and outputs of the layers of one block that get an adapter."""
    if layer < lora.first_block(config.num_layers):
        return
    for name, shape in linear_layers(config, layer).items():
        full = f".model.layers.{layer}.{name}"
        targets = lora.target_modules
        if targets == "all-linear" or any(full.endswith(f".{target}") for target in targets):
            yield shape


def linear_layers(c: ModelConfig, layer: int) -> Shapes:
    """Inputs and outputs of a block's linear layers, by their names in it; experts are none."""
    if c.mamba is not None and c.has_mamba(layer):
        mixer = _mamba_layers(c, c.mamba)
    else:
        mixer = _attention_layers(c)
    if c.moe is None or not c.has_experts(layer):
        return mixer | _gated_mlp(c, "mlp", c.intermediate_size)
    if shared := c.moe.shared_intermediate_size:
        return mixer | _gated_mlp(c, "mlp.shared_expert", shared)
    return mixer


# ---------------------------------------------------------------- what is kept


def _attention_bytes(c: ModelConfig, size: int, in_norm: int, mask_length: int) -> float:
    """q, k, v, y, y with its heads side by side, and the mask."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    kept = size * (3 * queries + 2 * keys + mask_length) + 4 * c.num_heads
    return kept + (in_norm * (queries + keys) if c.qk_norm else 0)


def _feed_forward_bytes(c: ModelConfig, layer: int, size: int) -> float:
    """A gated MLP keeps both projections, the activation and the product; experts, of k for each
    token, both projections, the router what it makes of E logits."""
    if c.moe is None or not c.has_experts(layer):
        return 4 * size * c.intermediate_size
    moe = c.moe
    experts = 2 * size * moe.experts_per_token * moe.intermediate_size
    return experts + 4 * size * moe.shared_intermediate_size + _router_bytes(c, size)


def _router_bytes(c: ModelConfig, size: int) -> float:
    """Its input in fp32, logits and probabilities; each choice with its weight and its place."""
    assert c.moe is not None
    cast = 4 * c.hidden_size if size < 4 else 0
    return cast + 12 * c.moe.num_experts + 40 * c.moe.experts_per_token


def experts_work_bytes(c: ModelConfig, layer: int, train: TrainSection) -> int:
    """What the experts' one operation makes of a token in its backward pass, beside what it returns:
    the gradients of both projections, the activated product, and its gradient; and in bf16 both
    sides of a weight's gradient as the products in C++ lay them out (mule/native/experts.h)."""
    if c.moe is None or not c.has_experts(layer):
        return 0
    size, inner = width(str(train.precision)), c.moe.intermediate_size
    laid_out = c.hidden_size + 2 * inner if size == 2 and _is_native(train) else 0
    return size * c.moe.experts_per_token * (4 * inner + laid_out)


def _is_native(train: TrainSection) -> bool:
    """Whether experts, convolutions and decays are computed in C++ (mule.models.native_training)."""
    is_served = str(train.device) not in ("cuda", "mps") and str(train.precision) != "fp16"
    return is_served and build.is_possible()


def attends_natively(c: ModelConfig, train: TrainSection) -> bool:
    """Whether attention is computed in C++, by document (mule.models.native_attention)."""
    return _is_native(train) and c.head_dim % _NATIVE_CHANNELS == 0


def _mamba_bytes(m: MambaConfig, size: int, *, is_native: bool) -> float:
    """What the input projection gives, what the convolution makes of it, and the recurrence's own.

    mamba2: in each chunk a square of weights for each head and of scores for each group, and its
    states; mamba1: steps and inputs in fp32, the states before each piece. What is not `is_native`
    keeps the convolution's products and the squares' decays, in fp32, besides.
    """
    cast = 0 if size == 4 else 8  # copies in fp32 of what is in bf16
    convolved = (1 if is_native else 3) * size * m.conv_size
    if m.kind == "mamba1":
        small = (8 + 2 * size) * (m.dt_rank + 2 * m.state_size)
        states = 4 * m.state_size * m.inner_size / _SCAN_PIECE
        return convolved + (3 * size + 20 + cast) * m.inner_size + states + small
    entered = size * (m.inner_size + m.conv_size + m.num_heads)
    decays = 0 if is_native else 4 * m.num_heads
    squares = m.chunk_size * (decays + size * (m.num_heads + m.num_groups))
    states = (4 + size) * m.state_size * m.inner_size / m.chunk_size
    return entered + convolved + squares + states + (20 + 4 * size + cast) * m.inner_size


def _feed_forward_products(c: ModelConfig, layer: int, size: int) -> float:
    """Both projections; of experts, whose kernel is one operation, its choices too."""
    if c.moe is None or not c.has_experts(layer):
        return size * 2 * c.intermediate_size
    moe = c.moe
    inner = moe.experts_per_token * moe.intermediate_size + moe.shared_intermediate_size
    return size * (2 * inner + c.hidden_size) + 4 * moe.num_experts


def _mamba_products(m: MambaConfig, size: int) -> float:
    if m.kind == "mamba1":
        projected = size * (3 * m.inner_size + m.dt_rank + 2 * m.state_size)
        return projected + 4 * m.inner_size * (1 + m.state_size / _SCAN_PIECE)
    entered = size * (m.inner_size + m.conv_size + m.num_heads)
    scores = size * m.chunk_size * m.num_groups
    states = size * m.state_size * m.inner_size / m.chunk_size
    return entered + scores + states + 2 * size * m.inner_size


def _beside_bytes(c: ModelConfig, layer: int, size: int, adapter: AdapterSection) -> float:
    """What the adapters of a block keep: A x; with dropout each its input and the mask; with DoRA
    each the results that it scales."""
    if adapter.kind == "none":
        return 0
    lora = adapter.lora
    kept = 0.0
    for inputs, outputs in adapted_matrices(c, lora, layer):
        kept += size * lora.r
        kept += (size + 1) * inputs if lora.dropout else 0
        kept += size * outputs * (2 if lora.dropout else 1) if lora.use_dora else 0
    return kept


# ---------------------------------------------------------------- matrices


def _attention_layers(c: ModelConfig) -> Shapes:
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    leaving = {"self_attn.o_proj": (queries, c.hidden_size)}
    if c.fused_projections:
        return {"self_attn.qkv_proj": (c.hidden_size, queries + 2 * keys)} | leaving
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return {f"self_attn.{name}": (c.hidden_size, n) for name, n in rows.items()} | leaving


def _mamba_layers(c: ModelConfig, m: MambaConfig) -> Shapes:
    leaving = {"mamba.out_proj": (m.inner_size, c.hidden_size)}
    if m.kind == "mamba2":
        entering = m.inner_size + m.conv_size + m.num_heads
        return {"mamba.in_proj": (c.hidden_size, entering)} | leaving
    return {
        "mamba.in_proj": (c.hidden_size, 2 * m.inner_size),
        "mamba.x_proj": (m.inner_size, m.dt_rank + 2 * m.state_size),
        "mamba.dt_proj": (m.dt_rank, m.inner_size),
    } | leaving


def _gated_mlp(c: ModelConfig, name: str, inner: int) -> Shapes:
    leaving = {f"{name}.down_proj": (inner, c.hidden_size)}
    if c.fused_mlp:
        return {f"{name}.gate_up_proj": (c.hidden_size, 2 * inner)} | leaving
    entering = (c.hidden_size, inner)
    return {f"{name}.gate_proj": entering, f"{name}.up_proj": entering} | leaving
