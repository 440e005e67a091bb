"""Activation checkpointing changes memory and time, and no bit of the gradients."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace

import pytest
import torch

from mule.adapters.lora import add_lora
from mule.batch import Batch
from mule.config.adapter import LoraSection
from mule.models import attention, native_training
from mule.models.decoder import Decoder
from mule.models.recompute import Recompute
from tests.tiny import TINY, random_batch, tiny_model
from tests.unit.memory_use import backward_calls, memory_use

KINDS: tuple[Recompute, ...] = ("none", "selective", "full")
LENGTH = 24
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def packed_batch(rows: int = 3) -> Batch:
    """Rows of three documents, of which attention sees its own only."""
    segments = (torch.arange(LENGTH) // 9 + 1).expand(rows, LENGTH).contiguous()
    return replace(random_batch(rows, LENGTH), segments=segments, isolated=True)


def gradients(model: Decoder, batch: Batch) -> dict[str, torch.Tensor]:
    """Of a forward and backward pass with one seed; the loss among them."""
    torch.manual_seed(11)
    nll = model.nll_sum(batch)
    nll.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": nll.detach()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("attends", ["causal", "mask", "by document"])
def test_gradients_are_the_same_bits(
    attends: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attends == "by document":
        monkeypatch.setattr(attention, "_DENSE_TOKENS", LENGTH - 1)
    batch = random_batch(3, LENGTH) if attends == "causal" else packed_batch()
    found = []
    for kind in KINDS:
        model = tiny_model().train()
        model.set_training(dropout=dropout, recompute=kind)
        found.append(gradients(model, batch))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def test_adapters_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights, so that no input of the first block needs a gradient; LoRA's own dropout."""
    found = []
    for kind in KINDS:
        model = tiny_model()
        add_lora(model.train(), LoraSection(r=3, dropout=0.2), seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.2)
        model.set_training(dropout=0.1, recompute=kind)
        found.append(gradients(model, packed_batch()))
    assert len(found[0]) == 2 * 7 * TINY.num_layers + 1
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def test_more_is_computed_again_and_less_is_kept() -> None:
    """Selective repeats no matrix product and no attention; full all but a block's last product."""
    kept, peaks, calls = [], [], []
    for kind in KINDS:
        model = tiny_model().train()
        model.set_training(recompute=kind)
        use = memory_use(model, random_batch(3, 64))
        kept.append(use.kept)
        peaks.append(use.peak)
        names = backward_calls(model, random_batch(3, 64))
        calls.append((names["aten::mm"], names[f"aten::{FLASH}"]))
    none, selective, full = calls
    assert none == selective and none[1] == 0
    assert full == (none[0] + 6 * TINY.num_layers, TINY.num_layers)
    assert kept[0] > 1.5 * kept[1] > 4 * kept[2]
    assert peaks[0] > peaks[1] > peaks[2]


def test_packed_attention_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_DENSE_TOKENS", LENGTH - 1)
    for kind, repeats in (("selective", 0), ("full", TINY.num_layers)):
        model = tiny_model().train()
        model.set_training(recompute=kind)
        calls = backward_calls(model, packed_batch())
        assert calls["mule::packed_attention_backward"] == TINY.num_layers
        assert calls["mule::packed_attention"] == repeats


def test_nothing_is_kept_for_later_without_gradients() -> None:
    """Validation and generation see the plain block, in training mode or not."""
    batch = random_batch(2, LENGTH)
    plain = tiny_model().eval()
    model = tiny_model().train()
    model.set_training(recompute="full")
    with torch.no_grad():
        assert torch.equal(model.nll_sum(batch), plain.nll_sum(batch))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's look
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_compiled_blocks_do_it_too(kind: Recompute, caplog: pytest.LogCaptureFixture) -> None:
    """With dropout: the same bits as compiled without, less memory, one graph, and no warning."""
    batch, found, kept = random_batch(3, 64), [], []
    for wanted in ("none", kind):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = tiny_model().train()
        model.set_training(dropout=0.3, recompute=wanted)
        model.compile_regions()
        found.append(gradients(model, batch))
        for parameter in model.parameters():
            parameter.grad = None
        assert_same_bits(gradients(model, batch), found[-1])
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"] and not counters["recompiles"]
        is_loss_compiled = native_training.library() is None
        assert counters["stats"]["unique_graphs"] == 1 + is_loss_compiled  # a block, and the loss
        kept.append(memory_use(model, batch).kept)
    assert_same_bits(*found)
    assert kept[1] < 0.8 * kept[0]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
