"""Attention by document equals attention under a dense mask, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mule.batch import IGNORE, Batch
from mule.models import attention, packed_attention
from mule.models.attention import document_mask
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.models.packed_attention import packed_attention as packed

DOCUMENTS = {
    "one": [40],
    "many": [1, 7, 3, 20, 9],
    "padded": [13, 2, 17],  # eight tokens of padding
    "edges": [16, 16, 8],  # documents end where windows do
    "empty": [],
}


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "_BLOCK", 16)
    monkeypatch.setattr(packed_attention, "_KEY_STEP", 4)


def _segments(*rows: str, length: int = 40) -> torch.Tensor:
    segments = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, name in enumerate(rows):
        start = 0
        for number, size in enumerate(DOCUMENTS[name], start=1):
            segments[row, start : start + size] = number
            start += size
    return segments


def _tensors(
    segments: torch.Tensor, heads: int, kv_heads: int, dtype: torch.dtype, head_dim: int = 12
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v as attention has them, and the gradient of y, which padding has none of."""
    generator = torch.Generator().manual_seed(4)
    rows, length = segments.shape

    def made(count: int) -> torch.Tensor:
        values = torch.randn(rows, length, count, head_dim, generator=generator)
        return values.to(dtype).transpose(1, 2)

    inputs = [made(count).requires_grad_() for count in (heads, kv_heads, kv_heads)]
    return inputs, made(heads) * (segments != 0)[:, None, :, None]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("head_dim", [12, 16, 80])  # C++ computes multiples of 16
def test_equals_a_dense_mask(
    heads: int, kv_heads: int, dtype: torch.dtype, limit: float, head_dim: int
) -> None:
    segments = _segments(*DOCUMENTS)
    inputs, grad = _tensors(segments, heads, kv_heads, dtype, head_dim)
    y, lse = packed(*inputs, segments, False)
    found = (y, *torch.autograd.grad(y, inputs, grad))
    exact = [t.detach().float().requires_grad_() for t in inputs]
    dense = F.scaled_dot_product_attention(
        *exact, attn_mask=document_mask(segments), enable_gqa=True
    )
    trained = (segments != 0)[:, None, :, None]
    expected = (dense * trained, *torch.autograd.grad(dense, exact, grad.float()))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs).norm() <= limit * theirs.norm()
    assert lse.dtype == torch.float32 and lse.shape == y.shape[:3]


def test_gradients_are_those_of_finite_differences() -> None:
    segments = _segments("padded", "many")
    inputs, grad = _tensors(segments, 2, 1, torch.float32)
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    y, _ = packed(*inputs, segments, False)
    gradients = torch.autograd.grad(y, inputs, grad.double())
    step = 1e-5
    for tensor, gradient in zip(inputs, gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).double()
        with torch.no_grad():
            moved = [
                [t + sign * step * direction if t is tensor else t for t in inputs]
                for sign in (1, -1)
            ]
            above, below = ((packed(*m, segments, False)[0] * grad).sum() for m in moved)
        slope = float(above - below) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-4)


@pytest.mark.parametrize("head_dim", [12, 32])
def test_a_row_does_not_depend_on_its_neighbours(head_dim: int) -> None:
    """So that any micro-batch gives the same bits."""
    segments = _segments("many", "padded", "one")
    inputs, grad = _tensors(segments, 6, 2, torch.float32, head_dim)
    y, _ = packed(*inputs, segments, False)
    together = (y, *torch.autograd.grad(y, inputs, grad))
    for row in range(3):
        own = [t.detach()[row : row + 1].requires_grad_() for t in inputs]
        y, _ = packed(*own, segments[row : row + 1], False)
        alone = (y, *torch.autograd.grad(y, own, grad[row : row + 1]))
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours[0], theirs[row])


@pytest.mark.parametrize("head_dim", [12, 16])
def test_the_operation_is_declared_as_it_behaves(head_dim: int) -> None:
    segments = _segments("many", "padded")
    inputs, _ = _tensors(segments, 6, 2, torch.float32, head_dim)
    torch.library.opcheck(packed, (*inputs, segments, False))


def _model() -> Decoder:
    config = ModelConfig(
        family="qwen3",
        vocab_size=50,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=40,
        qk_norm=True,
    )
    model = Decoder(config)
    model.init_weights(0)
    return model.train()


def _batch() -> Batch:
    segments = _segments("many", "padded", "one")
    ids = torch.randint(0, 50, segments.shape, generator=torch.Generator().manual_seed(2))
    targets = ids.roll(-1, 1).masked_fill(segments == 0, IGNORE)
    return Batch(ids, targets, torch.zeros_like(ids), segments, isolated=True)


def _gradients(model: Decoder) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model.nll_sum(_batch())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler's own look
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_learns_the_same_either_way(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_loss, expected = _gradients(_model())  # rows this short have a dense mask
    monkeypatch.setattr(attention, "_DENSE_TOKENS", 0)
    model = _model()
    if compiled:
        model.compile_regions()
    loss, found = _gradients(model)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_documents_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_DENSE_TOKENS", 0)
    model, batch = _model(), _batch()
    first = int((batch.segments[0] == 1).sum() + (batch.segments[0] == 2).sum())  # two documents
    own = batch.targets.clone()
    own[:, first:] = IGNORE
    own[1:] = IGNORE
    losses = []
    for changed in (False, True):
        ids = batch.input_ids.clone()
        if changed:
            ids[0, first:] = 7
        part = Batch(ids, own, batch.positions, batch.segments, isolated=True)
        losses.append(model.nll_sum(part).item())
    assert losses[0] == losses[1]
