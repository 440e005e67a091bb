"""The importance of a matrix's columns: how large what they are multiplied with is, on real tokens.

The error of a quantised product is the sum over columns of (error of the weight)² x (input)², so
that rounding weighs a column by the mean square of its input. Of an expert that is the mean over the
tokens that were sent to it.
Source: collect_imatrix in tools/imatrix/imatrix.cpp of llama.cpp b11549, which sums the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mule import fsio, progress
from mule.errors import ModelError
from mule.export.imatrix_file import ImportanceMatrix
from mule.export.measure import windows
from mule.export.origin import Original
from mule.models.decoder import Decoder
from mule.models.folder import load_model
from mule.models.moe import MoE
from mule.models.stored import Names
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


@dataclass
class Measured:
    """Of every matrix of the blocks, by our name of it.

    `sums` of squares float64: (columns), of experts (experts, columns); `tokens` that were summed,
    of experts those sent to each.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)


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
    found, names = measure(model, chunks), Names(model.config)
    squares, counts = {}, {}
    for name, tensor in Original(model_dir).planned.items():
        weight = names.place(tensor.source).name
        if weight in found.sums and name.startswith("blk."):
            squares[name] = found.sums[weight].numpy().astype(np.float32)
            tokens = found.tokens[weight]
            counts[name] = tuple(tokens.tolist()) if tokens.dim() else int(tokens)
    digest = fsio.sha256_json(chunks)
    said = f"{dataset}; {num_tokens:,} tokens, sha256 {digest}"
    return ImportanceMatrix(squares, counts, said, chunk)


@torch.no_grad()
def measure(model: Decoder, chunks: Sequence[Sequence[int]]) -> Measured:
    """Sums of squares over all tokens. A matrix that no module multiplies by itself is not there."""
    measured, handles = Measured(), []
    shared = {name for names in _SHARED.values() for name in names}
    for index, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            place = f"model.layers.{index}."
            if isinstance(module, nn.Linear) and name not in shared:
                keys = [f"{place}{n}.weight" for n in (name, *_SHARED.get(name, ()))]
                hook = _summing(measured, keys, module.in_features)
            elif isinstance(module, MoE):
                hook = _summing_experts(measured, f"{place}{name}.experts", module)
            else:
                continue
            handles.append(module.register_forward_pre_hook(hook))
    total_tokens = sum(map(len, chunks))
    try:
        with progress.task("Measuring importance", total=total_tokens, unit="tokens") as bar:
            for chunk in chunks:
                ids = torch.tensor([chunk])
                positions = torch.arange(len(chunk)).expand_as(ids)
                model.model(ids, positions)
                bar.advance(len(chunk))
    finally:
        for handle in handles:
            handle.remove()
    for name, total in measured.sums.items():
        if not torch.isfinite(total).all():
            raise ModelError(
                f"what {name} is multiplied with is NaN or infinite", "export an earlier checkpoint"
            )
    seen = {name for name, tokens in measured.tokens.items() if tokens.any()}
    return Measured(*({n: t[n] for n in t if n in seen} for t in (measured.sums, measured.tokens)))


def _summing(measured: Measured, names: Sequence[str], columns: int) -> Any:
    total, tokens = torch.zeros(columns, dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    measured.sums |= dict.fromkeys(names, total)
    measured.tokens |= dict.fromkeys(names, tokens)

    def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        total.add_(rows.double().square_().sum(0))
        tokens.add_(len(rows))

    return add


def _summing_experts(measured: Measured, name: str, module: MoE) -> Any:
    """Of what enters the experts that a token is sent to, and of what their down_proj is given."""
    gate_up, down = module.experts.gate_up_proj, module.experts.down_proj
    entering = torch.zeros(len(gate_up), gate_up.shape[2], dtype=torch.float64)
    inside = torch.zeros(len(down), down.shape[2], dtype=torch.float64)
    tokens = torch.zeros(len(down), dtype=torch.int64)
    for part, sums in (("gate_up_proj", entering), ("down_proj", inside)):
        measured.sums[f"{name}.{part}"], measured.tokens[f"{name}.{part}"] = sums, tokens

    def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        flat = args[0].reshape(-1, args[0].shape[-1])
        chosen = module.gate(flat).topk(module.top_k, dim=-1).indices
        for expert in range(len(down)):
            rows = flat[(chosen == expert).any(1)]
            gate, up = F.linear(rows, gate_up[expert]).chunk(2, -1)
            entering[expert] += rows.double().square_().sum(0)
            inside[expert] += (F.silu(gate) * up).double().square_().sum(0)
            tokens[expert] += len(rows)

    return add
