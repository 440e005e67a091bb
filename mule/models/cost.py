"""What a decoder costs: parameters, FLOPs, bytes. Closed forms; no torch."""

from __future__ import annotations

from mule.models.config import ModelConfig


def layer_params(c: ModelConfig) -> int:
    """Parameters of one block."""
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    norms = 2 * c.hidden_size + (2 * c.head_dim if c.qk_norm else 0)
    return attention + 3 * c.hidden_size * c.intermediate_size + norms


def embedding_params(c: ModelConfig) -> int:
    """Parameters of the embedding and, when untied, of the head."""
    return c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)


def total_params(c: ModelConfig) -> int:
    """All parameters, a tied embedding counted once."""
    return c.num_layers * layer_params(c) + embedding_params(c) + c.hidden_size


def matmul_params(c: ModelConfig) -> int:
    """Parameters that take part in a matrix product for every token (the head counts, norms do not)."""
    norms = 2 * c.hidden_size + (2 * c.head_dim if c.qk_norm else 0)
    return c.num_layers * (layer_params(c) - norms) + c.vocab_size * c.hidden_size


def train_flops_per_token(c: ModelConfig, seq_length: int) -> float:
    """Useful FLOPs of a forward and backward pass, per token.

    6 per matmul parameter, and causal attention's 6 * num_layers * seq_length * num_heads * head_dim
    (half of the full square). Source: PaLM, appendix B, with the causal half.
    """
    attention = 6 * c.num_layers * seq_length * c.num_heads * c.head_dim
    return 6 * matmul_params(c) + attention


def lora_flops_per_token(c: ModelConfig, seq_length: int) -> float:
    """As `train_flops_per_token` with frozen weights: no weight gradients, so 4 per parameter."""
    attention = 6 * c.num_layers * seq_length * c.num_heads * c.head_dim
    return 4 * matmul_params(c) + attention


def kv_bytes_per_token(c: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes of key/value cache for one token."""
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * bytes_per_value
