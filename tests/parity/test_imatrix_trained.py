"""An importance matrix on a trained model: what it is for gets better, on rows it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mule.adapters.source import find_source
from mule.export.dequantized import _decoder
from mule.export.gguf import write_gguf
from mule.export.imatrix import importance_of
from mule.export.origin import Original
from mule.export.stored import StoredTensors
from mule.generate.gguf_header import read_header
from mule.models.decoder import Decoder
from mule.models.folder import load_model
from mule.tokenizer import Tokenizer
from tests.parity.trained_families import marked, trained


def inputs_of(model: Decoder, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """What every matrix of the blocks is multiplied with, token by token."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):

            def keep(_: nn.Module, args: tuple[torch.Tensor], name: str = name) -> None:
                seen.setdefault(f"model.{name}.weight", []).append(args[0][0])

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for ids in rows:
            model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@torch.no_grad()
def product_error(file: Path, model_dir: Path, inputs: dict[str, torch.Tensor]) -> float:
    """The mean over matrices of |(W - W')x|² / |Wx|²."""
    exact = dict(load_model(model_dir).named_parameters())
    rounded = dict(
        _decoder(StoredTensors(read_header(file)), Original(model_dir)).named_parameters()
    )
    shares = []
    for name, x in inputs.items():
        wanted, found = (x.double() @ w[name].double().T for w in (exact, rounded))
        shares.append(float((found - wanted).square().sum() / wanted.square().sum()))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("family", marked())
def test_products_are_nearer_on_rows_it_never_saw(family: str, tmp_path: Path) -> None:
    model = trained(family)
    model_dir = find_source(str(model.run)).model_dir
    assert model_dir is not None
    tokenizer = Tokenizer.load(model_dir)
    lines = (model.folder / "data" / "sft.valid.jsonl").read_text().splitlines()
    chats = [
        tokenizer.render_chat(json.loads(line)["messages"], add_generation_prompt=False)
        for line in lines
    ]
    found = importance_of(model_dir, chats[::2], "every other chat", special=True)
    rows = tokenizer.encode_batch(chats[1::2], special=True)
    inputs = inputs_of(load_model(model_dir).eval(), rows)
    for type_name in ("q4_k_m", "q2_k"):
        errors = []
        for name, importance in (("plain", None), ("weighed", found)):
            file = tmp_path / f"{name}.gguf"
            write_gguf(model_dir, file, type_name, importance=importance)
            errors.append(product_error(file, model_dir, inputs))
        assert errors[1] < 0.96 * errors[0], type_name  # measured 0.86 to 0.92
