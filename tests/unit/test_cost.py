"""Parameters, FLOPs and bytes of every family in closed form, against the modules themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mule.config.load import load_recipe
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.plan.shape import new_model_config

SMALL = [
    *("model.hidden_size=64", "model.num_layers=5", "model.head_dim=16", "model.vocab_size=320"),
    "data.train=[a.txt]",
]
HEADS = ["model.num_heads=4", "model.num_kv_heads=2"]
MOE = ["model.moe.num_experts=6", "model.moe.experts_per_token=2", "model.moe.intermediate_size=32"]
WORDS = {
    "llama": ["model.family=llama", *HEADS, "model.tie_embeddings=false"],
    "qwen3": [*HEADS, "model.sliding_window=16", "model.sliding_layers=[1,3]"],
    "experts": ["model.family=qwen3_moe", *HEADS, *MOE],
    "shared expert": [
        *("model.family=granitemoeshared", *HEADS, *MOE, "model.moe.shared_intermediate_size=96"),
    ],
    "no positions": [
        *("model.family=granitemoehybrid", "model.mamba.kind=none", *HEADS),
        "model.position_embedding=none",
    ],
    "mamba2": [
        *("model.family=granitemoehybrid", "model.mamba.num_groups=2", "model.mamba.head_dim=16"),
        *("model.mamba.state_size=24", "model.mamba.chunk_size=16"),
    ],
    "hybrid": [
        *("model.family=granitemoehybrid", *HEADS, "model.mamba.attention_every=3"),
        *("model.mamba.conv_kernel=3", "model.mamba.state_size=8"),
    ],
    "hybrid with experts": [
        *("model.family=granitemoehybrid", *HEADS, *MOE, "model.mamba.attention_every=2"),
    ],
    "mamba1": ["model.family=jamba", "model.mamba.state_size=8", "model.mamba.dt_rank=5"],
    "mamba1 hybrid": ["model.family=jamba", *HEADS, "model.mamba.attention_every=4"],
}


def shape(name: str) -> ModelConfig:
    words = [word for word in SMALL if "head_dim" not in word or "num_heads" in str(WORDS[name])]
    return new_model_config(load_recipe(None, [*words, *WORDS[name]]).recipe, 320)


@pytest.mark.parametrize("name", WORDS)
def test_parameters_are_those_of_the_modules(name: str) -> None:
    """All of them; and a token's are all but those of experts that were not chosen."""
    config = shape(name)
    with torch.device("meta"):
        model = Decoder(config)
    assert cost.total_params(config) == sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    assert blocks == [cost.layer_params(config, layer) for layer in range(config.num_layers)]
    idle = 0
    if config.moe is not None:
        idle = 5 * (6 - 2) * 3 * 64 * 32
    assert cost.active_params(config) == cost.total_params(config) - idle


@pytest.mark.parametrize("name", ["qwen3", "hybrid", "mamba2"])
def test_flops_of_a_pass_are_those_counted(name: str) -> None:
    """By PyTorch, of matrix products: it sees whole squares, of which half is used, no convolution."""
    from torch.utils.flop_counter import FlopCounterMode

    config, length = replace(shape(name), sliding_window=None, sliding_layers=()), 64
    with torch.device("meta"):
        model, ids = Decoder(config), torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        model(ids)
    forward = cost.train_flops_per_token(config, length) / 3
    if mamba := config.mamba:
        chunk = min(mamba.chunk_size, length)
        square = chunk * (mamba.num_groups * mamba.state_size + mamba.inner_size)
        convolution = 2 * mamba.conv_kernel * mamba.conv_size
        forward += len(config.mamba_layers) * (square - convolution)
    forward += len(config.attention_layers) * 2 * length * config.num_heads * config.head_dim
    assert counted.get_total_flops() == length * forward


def test_flops_of_experts_and_of_a_scan() -> None:
    """Six for each weight that a token meets, the router's too; a scan's by hand."""
    experts = shape("shared expert")
    a_block = 64 * 16 * (2 * 4 + 2 * 2) + 64 * 6 + 3 * 64 * (2 * 32 + 96)
    assert cost.matmul_params(experts) == 5 * a_block + 320 * 64
    attention = 5 * 3 * 2 * 100 * 4 * 16
    assert cost.train_flops_per_token(experts, 100) == 6 * cost.matmul_params(experts) + attention
    scan = shape("mamba1")
    of_states, of_inputs = 6 * 128 * 8, 2 * 4 * 128
    expected = 6 * cost.matmul_params(scan) + 5 * 3 * (of_states + of_inputs)
    assert cost.train_flops_per_token(scan, 100) == expected


@pytest.mark.parametrize("name", ["llama", "hybrid", "mamba2", "mamba1 hybrid"])
def test_bytes_of_a_cache_are_those_allocated(name: str) -> None:
    config = shape(name)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            cache = Decoder(config).to(dtype).new_cache(1, 64)
        assert cache.num_bytes == cost.cache_bytes(config, 64, dtype.itemsize)
    of_keys = 2 * config.num_kv_heads * config.head_dim * len(config.attention_layers)
    assert cost.kv_bytes_per_token(config) == 2 * of_keys


def test_what_decoding_moves() -> None:
    """Active weights, the cache, and states twice; an embedding that is not the head is one row."""
    config = shape("hybrid with experts")
    moved = 2 * cost.active_params(config) + cost.cache_bytes(config, 500)
    moved += cost.state_bytes(config)
    assert cost.decode_bytes_per_token(config, 500) == moved
    assert cost.decode_ceiling(config, 500, 1e9) == 1e9 / moved
    untied = shape("llama")
    tied = replace(untied, tie_embeddings=True)
    assert cost.decode_bytes_per_token(untied, 9) == cost.decode_bytes_per_token(tied, 9)
    window = replace(tied, sliding_window=16, sliding_layers=(0, 1))
    assert cost.cache_bytes(window, 100) == 2 * 2 * 2 * 16 * (3 * 100 + 2 * 16)
