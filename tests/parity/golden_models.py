"""Tiny models whose weights are the same bits on every machine, for the golden hashes of quantisers.

`tools/golden_quants.py` has llama.cpp's own quantiser make files of them, and records a hash of each
tensor in golden_quants.json.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from safetensors.numpy import save_file

from mule import fsio
from mule.export.families import read_shape, weight_shapes
from mule.models.families import family
from tests.parity.tiny_gguf import VOCAB_ROWS, tiny_tokenizer

RECORD = Path(__file__).with_name("golden_quants.json")
TYPES = ("q4_k_m", "q5_k_m", "q8_0", "q6_k", "q4_k_s", "q5_k_s", "q3_k_m", "q2_k", "iq4_xs")
_OF_EXPERTS = "mxfp4"  # what only these can have
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_ROWS,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
# Nine layers: mixtures treat the first and last eighth apart. Rows of 320 and 160 do not divide into
# blocks of 256, those of 328 into none.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 9},
    "qwen2": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "query_pre_attn_scalar": 64,
        "sliding_window": 64,
    },
    "phi3": {"model_type": "phi3", "num_hidden_layers": 2, "sliding_window": None},
    "odd rows": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 320,
        "head_dim": 40,
        "intermediate_size": 328,
    },
    "experts": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
    "eight experts": {
        "model_type": "granitemoeshared",
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 512,
        "attention_multiplier": 0.125,
    },
    "hybrid": {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "layer_types": ["mamba", "attention", "mamba", "attention", "mamba"],
        "shared_intermediate_size": 256,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
        "attention_multiplier": 0.125,
    },
    "jamba": {
        "model_type": "jamba",
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 0,
        "mamba_d_state": 16,
        "mamba_dt_rank": 16,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
}


def types_of(model: str) -> tuple[str, ...]:
    """The types that the model of MODELS is recorded in."""
    with_experts = model in ("experts", "eight experts")
    return (*TYPES, _OF_EXPERTS) if with_experts else TYPES


def write_golden_model(folder: Path, name: str) -> None:
    """The folder of the model of MODELS called `name`: made of sums of whole numbers and products,
    which every machine computes alike."""
    raw = _SIZES | MODELS[name]
    config = family(raw["model_type"]).from_hf(raw)
    draw = np.random.RandomState(len(name))  # whose stream of numbers is frozen
    tokenizer = tiny_tokenizer()
    with fsio.atomic_folder(folder) as out:
        tokenizer.save(out)
        raw = family(config.family).to_hf(config) | {"eos_token_id": tokenizer.eos_id}
        (out / "config.json").write_text(json.dumps(raw))
        shapes = weight_shapes(*read_shape(out))
        weights = {key: _drawn(draw, shape) for key, shape in shapes.items()}
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _drawn(draw: np.random.RandomState, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Bell-shaped, each row of another size, as those of a trained model."""
    bell = sum(draw.randint(0, 2**16, shape).astype(np.int64) for _ in range(4)) - 2**17
    gain = draw.randint(1, 2**8, (shape[0], *[1] * (len(shape) - 1)))
    return (bell * gain).astype(np.float32) * np.float32(2.0**-28)


def tensor_record(file: Path) -> dict[str, str]:
    """Of each tensor of more than one dimension: its type, and the beginning of its SHA-256.

    But for exponentials, whose last bits are not every machine's.
    """
    return {
        tensor.name: f"{tensor.tensor_type.name} {_sha256(tensor.data)[:16]}"
        for tensor in GGUFReader(file).tensors
        if sum(size > 1 for size in tensor.shape) > 1 and not tensor.name.endswith(".ssm_a")
    }


def _sha256(data: npt.NDArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).data.cast("B")).hexdigest()
