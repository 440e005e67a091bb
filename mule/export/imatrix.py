"""The importance of a matrix's columns: how large what they are multiplied with is, on real tokens.

The error of a quantised product is the sum over columns of (error of the weight)² x (input)², so
that rounding weighs a column by the mean square of its input.
Source: collect_imatrix in tools/imatrix/imatrix.cpp of llama.cpp b11549, which sums the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.tensor_mapping import get_tensor_name_map
from torch import nn

from mule import fsio, progress
from mule.errors import ModelError
from mule.export.families import read_shape
from mule.export.imatrix_file import ImportanceMatrix
from mule.export.measure import windows
from mule.models.decoder import Decoder
from mule.models.folder import load_model
from mule.tokenizer import Tokenizer

CHUNK_TOKENS = 512
MAX_TOKENS = (
    32_768  # more changes the means little; a 0.5B model takes minutes for these on a laptop
)
MIN_TOKENS = 256
# Matrices with one input: what is measured at the first holds for the others.
_SHARED = {
    "self_attn.q_proj": ("self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_proj": ("mlp.up_proj",),
}


def importance_of(
    model_dir: Path,
    texts: Sequence[str],
    dataset: str,
    *,
    special: bool,
    max_tokens: int = MAX_TOKENS,
) -> ImportanceMatrix:
    """The matrix of the model in `model_dir` on `texts`; `special`: their control tokens count.

    The texts are taken by turns, 512 tokens at a time, up to `max_tokens`; nothing is padded.
    Raises ModelError where they are too few, or where the model gives no finite numbers.
    """
    tokenizer = Tokenizer.load(model_dir)
    encoded = tokenizer.encode_batch(texts, special=special)
    model = load_model(model_dir, dtype=torch.float32).eval()
    chunk = min(CHUNK_TOKENS, model.config.max_position_embeddings)
    chunks = windows(encoded, [], chunk, max_tokens)
    num_tokens = sum(map(len, chunks))
    if num_tokens < MIN_TOKENS:
        raise ModelError(
            f"an importance matrix of {num_tokens} tokens says nothing; it takes {MIN_TOKENS} "
            "at least, and some ten thousand to be good",
            "give more texts or chats: --imatrix FILE.jsonl",
        )
    squares = measure(model, chunks)
    names = get_tensor_name_map(read_shape(model_dir)[0].arch, model.config.num_layers)
    renamed = {}
    for name, sums in squares.items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        renamed[found] = sums.numpy().astype(np.float32)
    digest = fsio.sha256_json(chunks)
    return ImportanceMatrix(
        renamed,
        dict.fromkeys(renamed, num_tokens),
        f"{dataset}; {num_tokens:,} tokens, sha256 {digest}",
        chunk,
    )


@torch.no_grad()
def measure(model: Decoder, chunks: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Sums of squares (columns) float64 over all tokens, by the name of every block's matrices."""
    sums: dict[str, torch.Tensor] = {}
    handles = []
    shared = {name for names in _SHARED.values() for name in names}
    for index, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and name not in shared:
                place = f"model.layers.{index}."
                keys = [f"{place}{n}.weight" for n in (name, *_SHARED.get(name, ()))]
                total = torch.zeros(module.in_features, dtype=torch.float64)
                sums |= dict.fromkeys(keys, total)
                handles.append(module.register_forward_pre_hook(_summing(total)))
    total_tokens = sum(map(len, chunks))
    try:
        with progress.task("Measuring importance", total=total_tokens, unit="tokens") as bar:
            for chunk in chunks:
                ids = torch.tensor([chunk])
                positions = torch.arange(len(chunk)).expand_as(ids)
                model.model(ids, positions, None)
                bar.advance(len(chunk))
    finally:
        for handle in handles:
            handle.remove()
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise ModelError(
                f"what {name} is multiplied with is NaN or infinite", "export an earlier checkpoint"
            )
    return sums


def _summing(total: torch.Tensor) -> Any:
    def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        total.add_(rows.double().square_().sum(0))

    return add
