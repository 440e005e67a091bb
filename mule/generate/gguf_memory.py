"""How many tokens llama.cpp's cache of a GGUF file may hold in this machine's memory."""

from __future__ import annotations

from typing import Any

from mule import machine
from mule.errors import ModelError
from mule.generate.gguf_header import GgufHeader

_MAX_SHARE = 0.25  # of the free memory, for rows beyond the first


def cache_token_bytes(header: GgufHeader, *, exact: bool = False) -> int:
    """Bytes of keys and values of one token, over all layers; `exact` keeps float32, else 16 bits."""
    metadata = header.metadata
    arch = metadata.get("general.architecture")

    def number(key: str, default: int) -> int:
        value = metadata.get(f"{arch}.{key}", default)
        return value if isinstance(value, int) and 0 < value < 2**32 else default

    num_layers, num_heads = number("block_count", 1), number("attention.head_count", 1)
    head_dim = number("embedding_length", 1) // num_heads
    width = number("attention.key_length", head_dim) + number("attention.value_length", head_dim)
    kv_heads: Any = metadata.get(f"{arch}.attention.head_count_kv", num_heads)
    heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * num_layers
    return sum(int(count) for count in heads) * width * (4 if exact else 2)


def state_row_bytes(header: GgufHeader) -> int:
    """Bytes that each row's states take in Mamba layers, in float32; 0 without such layers."""
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    kv_heads = metadata.get(f"{arch}.attention.head_count_kv")
    layers = kv_heads.count(0) if isinstance(kv_heads, list) else 0
    inner, state, kernel, groups = (
        value if isinstance(value := metadata.get(f"{arch}.ssm.{key}", 0), int) else 0
        for key in ("inner_size", "state_size", "conv_kernel", "group_count")
    )
    conv = max(0, kernel - 1) * (inner + 2 * groups * state)
    return layers * 4 * (conv + state * inner)


def cache_tokens(header: GgufHeader, context: int, num_rows: int, *, exact: bool) -> int:
    """Tokens of a cache for `num_rows` of `context` tokens; fewer where the memory is short.

    Raises ModelError when not even one row fits beside the weights.
    """
    a_token = max(1, cache_token_bytes(header, exact=exact))
    free = machine.available_bytes() - header.size_bytes - num_rows * state_row_bytes(header)
    if context * a_token > free:
        most = max(0, free // a_token)
        raise ModelError(
            f"{header.file}: a context of {context:,} tokens takes {context * a_token / 2**30:.1f} "
            f"GiB of memory; {max(0, free) / 2**30:.1f} GiB are free beside the file",
            f"ask for fewer tokens (--context {most // 256 * 256})"
            if most >= 256
            else "close other programs, or use a smaller model or type",
        )
    shared = int(_MAX_SHARE * free) // a_token
    return max(context, min(num_rows * context, shared))
