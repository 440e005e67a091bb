"""What a decoder costs: parameters, FLOPs, bytes. Closed forms; no torch."""

from __future__ import annotations

from mule.config.adapter import AdapterSection
from mule.models.config import MambaConfig, ModelConfig


def layer_params(c: ModelConfig, layer: int) -> int:
    """Parameters of one block, all experts included."""
    return active_layer_params(c, layer) + _idle_expert_params(c, layer)


def active_layer_params(c: ModelConfig, layer: int) -> int:
    """Parameters of one block that a token passes: of experts those chosen for it, and the router."""
    return layer_matmul_params(c, layer) + _vector_params(c, layer)


def layer_matmul_params(c: ModelConfig, layer: int) -> int:
    """Parameters of one block that take part in a matrix product for every token."""
    return mixer_matmul_params(c, layer) + _feed_forward_params(c, layer)


def mixer_matmul_params(c: ModelConfig, layer: int) -> int:
    """Of attention, or of the state-space layer in its place."""
    if c.mamba is None or not c.has_mamba(layer):
        return c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    m = c.mamba
    through = m.inner_size * c.hidden_size
    if m.kind == "mamba2":  # in: gate, what passes the convolution, a step for each head
        return c.hidden_size * (m.inner_size + m.conv_size + m.num_heads) + through
    steps = m.inner_size * (m.dt_rank + 2 * m.state_size) + m.dt_rank * m.inner_size
    return 2 * through + steps + through


def _feed_forward_params(c: ModelConfig, layer: int) -> int:
    if c.moe is None or not c.has_experts(layer):
        return 3 * c.hidden_size * c.intermediate_size
    moe = c.moe
    width = moe.experts_per_token * moe.intermediate_size + moe.shared_intermediate_size
    return c.hidden_size * (moe.num_experts + 3 * width)


def _idle_expert_params(c: ModelConfig, layer: int) -> int:
    """Of the experts that were not chosen for a token."""
    if c.moe is None or not c.has_experts(layer):
        return 0
    others = c.moe.num_experts - c.moe.experts_per_token
    return others * 3 * c.hidden_size * c.moe.intermediate_size


def _vector_params(c: ModelConfig, layer: int) -> int:
    """Norms, biases, and a state-space layer's convolution and decays, of one block."""
    found = (4 if c.sandwich_norms else 2) * c.hidden_size
    if c.mlp_bias:
        found += 2 * c.intermediate_size + c.hidden_size
    if c.has_mamba(layer):
        return found + _mamba_vector_params(c)
    found += 2 * c.head_dim if c.qk_norm else 0
    found += c.head_dim * (c.num_heads + 2 * c.num_kv_heads) if c.qkv_bias else 0
    return found + (c.hidden_size if c.o_bias else 0)


def _mamba_vector_params(c: ModelConfig) -> int:
    m = c.mamba
    assert m is not None
    convolution = m.conv_size * (m.conv_kernel + (1 if m.conv_bias else 0))
    out_bias = c.hidden_size if m.proj_bias else 0
    if m.kind == "mamba2":
        in_bias = m.inner_size + m.conv_size + m.num_heads if m.proj_bias else 0
        return convolution + 3 * m.num_heads + m.inner_size + in_bias + out_bias
    in_bias = 2 * m.inner_size if m.proj_bias else 0
    norms = m.dt_rank + 2 * m.state_size if m.inner_norms else 0
    return convolution + m.inner_size * (m.state_size + 2) + norms + in_bias + out_bias


def embedding_params(c: ModelConfig) -> int:
    """Parameters of the embedding and, when untied, of the head."""
    return c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)


def total_params(c: ModelConfig) -> int:
    """All parameters, a tied embedding counted once."""
    blocks = sum(layer_params(c, layer) for layer in range(c.num_layers))
    return blocks + embedding_params(c) + c.hidden_size


def active_params(c: ModelConfig) -> int:
    """Those that a token passes: all but the experts that were not chosen for it."""
    idle = sum(_idle_expert_params(c, layer) for layer in range(c.num_layers))
    return total_params(c) - idle


def matmul_params(c: ModelConfig) -> int:
    """Parameters that take part in a matrix product for every token (the head counts, norms do not)."""
    blocks = sum(layer_matmul_params(c, layer) for layer in range(c.num_layers))
    return blocks + c.vocab_size * c.hidden_size


def train_flops_per_token(c: ModelConfig, seq_length: int) -> float:
    """Useful FLOPs of a forward and backward pass, per token.

    6 per matmul parameter that is active, and thrice what mixing tokens takes forward: causal
    attention's 2 * seq_length * num_heads * head_dim (half of the full square), less where a layer
    sees a window; a state-space layer's products. Source: PaLM, appendix B, with the causal half.
    """
    mixing = sum(mixing_flops(c, layer, seq_length) for layer in range(c.num_layers))
    return 6 * matmul_params(c) + 3 * mixing


def lora_flops_per_token(
    c: ModelConfig, seq_length: int, num_adapted_layers: int | None = None
) -> float:
    """As `train_flops_per_token` with frozen weights: no weight gradients, so 4 per parameter.

    With adapters in the last `num_adapted_layers` blocks only, no gradient flows below them: their
    forward pass remains, 2 per parameter and a third of attention.
    """
    first = 0 if num_adapted_layers is None else c.num_layers - num_adapted_layers
    flops = 4.0 * c.vocab_size * c.hidden_size
    for layer in range(c.num_layers):
        forward = 2 * layer_matmul_params(c, layer), mixing_flops(c, layer, seq_length)
        flops += sum(forward) if layer < first else 2 * forward[0] + 3 * forward[1]
    return flops


def recipe_flops_per_token(c: ModelConfig, adapter: AdapterSection, seq_length: int) -> float:
    """Of one trained token: with an adapter or without."""
    if adapter.kind == "none":
        return train_flops_per_token(c, seq_length)
    adapted = c.num_layers - adapter.lora.first_block(c.num_layers)
    return lora_flops_per_token(c, seq_length, adapted)


def mixing_flops(c: ModelConfig, layer: int, seq_length: int) -> float:
    """FLOPs of one layer's causal attention or state-space recurrence, forward, per token."""
    if c.mamba is not None and c.has_mamba(layer):
        return _recurrence_flops(c.mamba, seq_length)
    keys = seq_length / 2
    if c.sliding_window is not None and layer in c.sliding_layers:
        window = min(c.sliding_window, seq_length)
        keys = window - window**2 / (2 * seq_length)  # the first tokens see fewer
    return 4 * keys * c.num_heads * c.head_dim


def _recurrence_flops(m: MambaConfig, seq_length: int) -> float:
    """Of the short convolution, and of the states.

    mamba2: in chunks of Q tokens the causal halves of C B^T for each group and of its product with
    x; into and out of the states, 2 each (Dao and Gu 2024, section 6). mamba1: a state's decay, what
    is added and what is read, 2 each.
    """
    convolution = 2 * m.conv_kernel * m.conv_size
    states = m.inner_size * m.state_size
    if m.kind == "mamba1":
        return convolution + 6 * states
    chunk = min(m.chunk_size, seq_length)
    return convolution + chunk * (m.num_groups * m.state_size + m.inner_size) + 4 * states


def kv_bytes_per_token(c: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes of key/value cache for one token: of the blocks that attend."""
    return 2 * len(c.attention_layers) * c.num_kv_heads * c.head_dim * bytes_per_value


def state_bytes(c: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that the state-space layers keep of a sequence, however long it is.

    The states are in fp32, the last inputs of the convolution as the weights are.
    """
    if c.mamba is None:
        return 0
    m = c.mamba
    convolution = (m.conv_kernel - 1) * m.conv_size * bytes_per_value
    return len(c.mamba_layers) * (convolution + 4 * m.inner_size * m.state_size)


def cache_bytes(c: ModelConfig, context_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of all that is kept of a sequence: keys and values, in windows no more than those, and
    states."""
    a_layer = 2 * c.num_kv_heads * c.head_dim * bytes_per_value
    windows = sum(layer in c.sliding_layers for layer in c.attention_layers)
    in_window = min(context_tokens, c.sliding_window or context_tokens)
    tokens = (len(c.attention_layers) - windows) * context_tokens + windows * in_window
    return a_layer * tokens + state_bytes(c, bytes_per_value)


def decode_bytes_per_token(c: ModelConfig, context_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes that decoding one token of one sequence moves: active weights, keys and values read,
    states read and written. Of an embedding that is not the head too, a row alone is read."""
    lookup = 0 if c.tie_embeddings else c.vocab_size * c.hidden_size
    weights = (active_params(c) - lookup) * bytes_per_value
    states = state_bytes(c, bytes_per_value)
    return weights + cache_bytes(c, context_tokens, bytes_per_value) + states


def decode_ceiling(
    c: ModelConfig, context_tokens: int, bytes_per_second: float, bytes_per_value: int = 2
) -> float:
    """Tokens per second that no decoding of one sequence exceeds where memory is the limit."""
    return bytes_per_second / decode_bytes_per_token(c, context_tokens, bytes_per_value)
