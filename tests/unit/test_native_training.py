"""Attention and the loss in C++: long documents, windows, bits, and what happens without a compiler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mule import machine, progress
from mule.batch import IGNORE
from mule.models import native_attention, native_loss, native_training
from mule.models.packed_attention import packed_attention
from tests.notes import Notes
from tests.tiny import TINY, random_batch, tiny_model

Tensors = list[torch.Tensor]


def _inputs(length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensors:
    """q, k, v and the gradient of y, of two rows."""
    generator = torch.Generator().manual_seed(length)

    def made(count: int) -> torch.Tensor:
        values = torch.randn(2, length, count, head_dim, generator=generator)
        return values.to(dtype).transpose(1, 2)

    return [made(count) for count in (heads, kv_heads, kv_heads, heads)]


def _segments(length: int) -> torch.Tensor:
    """A long document and a short one; in the second row a document of one token, and padding."""
    segments = torch.ones(2, length, dtype=torch.int64)
    segments[:, length * 3 // 4 :] = 2
    segments[1, length * 3 // 4 + 1 :] = 3
    segments[1, -9:] = 0
    return segments


def _exact(tensors: Tensors, segments: torch.Tensor, window: int | None, scale: float) -> Tensors:
    """y and the gradients in fp64, by definition."""
    q, k, v = (t.detach().double().requires_grad_() for t in tensors[:3])
    group, places = q.shape[1] // k.shape[1], torch.arange(q.shape[2])
    seen = (segments[:, :, None] == segments[:, None, :]) & (places <= places[:, None])
    if window is not None:
        seen &= places > places[:, None] - window
    trained = (segments != 0)[:, None, :, None]
    scores = (q @ k.repeat_interleave(group, 1).mT) * scale
    shares = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    y = (shares @ v.repeat_interleave(group, 1)) * trained
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), tensors[3].double())]


def _found(
    tensors: Tensors, segments: torch.Tensor, window: int | None, scale: float | None
) -> Tensors:
    q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
    y, _ = packed_attention(q, k, v, segments, False, window=window, scale=scale)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), tensors[3])]


@pytest.fixture
def natively() -> None:
    if not native_attention.serves(torch.zeros(1), 64):
        pytest.skip("no C++ compiler")


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("window", [None, 2, 37, 64, 150])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 64), (4, 1, 48), (6, 3, 128)])
def test_blocks_of_queries_and_keys(
    dtype: torch.dtype, limit: float, window: int | None, heads: int, kv_heads: int, head_dim: int
) -> None:
    segments = _segments(331)
    tensors = _inputs(331, heads, kv_heads, head_dim, dtype)
    found = _found(tensors, segments, window, 0.2)
    for ours, theirs in zip(found, _exact(tensors, segments, window, 0.2), strict=True):
        assert (ours.double() - theirs).norm() <= limit * theirs.norm()
    padding = (segments == 0)[:, None, :, None]
    assert all(not t.masked_select(padding).any() for t in found)


@pytest.mark.usefixtures("natively")
def test_a_later_token_changes_nothing() -> None:
    """To the bit, in scores so far apart that shares vanish."""
    tensors = [t * 30 for t in _inputs(150, 2, 1, 16, torch.float32)]
    segments = torch.ones(2, 150, dtype=torch.int64)
    before = _found(tensors, segments, None, None)[0]
    assert before.isfinite().all()
    for name in (1, 2):
        tensors[name] = tensors[name].clone()
        tensors[name][:, :, 90:] = -7.0
    after = _found(tensors, segments, None, None)[0]
    assert torch.equal(before[:, :, :90], after[:, :, :90])
    assert not torch.equal(before[:, :, 90:], after[:, :, 90:])


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    tensors, segments = _inputs(200, 4, 2, 64, dtype), _segments(200)
    logits = torch.randn(9, 1_003, generator=torch.Generator().manual_seed(1)).to(dtype)
    known, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            gradient = logits.clone()
            nll = native_loss.softmax_nll_(gradient, torch.arange(9), None, None)
            results.append([*_found(tensors, segments, None, None), nll, gradient])
    finally:
        torch.set_num_threads(known)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("natively")
def test_channels_that_are_apart() -> None:
    tensors, segments = _inputs(70, 2, 2, 16, torch.float32), torch.ones(2, 70, dtype=torch.int64)
    apart = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors]
    assert apart[0].stride(-1) != 1
    expected = _found(tensors, segments, None, None)
    for ours, theirs in zip(_found(apart, segments, None, None), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("natively")
def test_what_it_does_not_compute() -> None:
    assert not native_attention.serves(torch.zeros(1), 12)
    assert not native_attention.serves(torch.zeros(1, dtype=torch.float16), 64)
    assert not native_attention.serves(torch.zeros(1, device="meta"), 64)
    assert not native_loss.serves(torch.zeros(1, dtype=torch.float16))


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_no_numbers(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[0, 7] = math.nan
    logits[1, 8] = math.inf
    logits[2, 9] = -math.inf
    targets = torch.tensor([1, 2, 3, 4])
    for row, finite in enumerate((False, False, True, True)):
        own = logits[row : row + 1].clone()
        nll = native_loss.softmax_nll_(own, targets[row : row + 1], None, None)
        assert bool(nll.isfinite()) is finite and bool(own.isfinite().all()) is finite
    own = logits[2:].clone()
    expected = F.cross_entropy(logits[2:].float(), targets[2:], reduction="sum")
    found = native_loss.softmax_nll_(own, targets[2:], None, None)
    assert found == pytest.approx(float(expected), rel=1e-5) and own[0, 9] == 0


@pytest.mark.usefixtures("natively")
def test_targets() -> None:
    logits = torch.randn(3, 40)
    found = native_loss.softmax_nll_(logits, torch.full((3,), IGNORE), None, None)
    assert found == 0 and not logits.any()
    for wrong in (40, -7):
        with pytest.raises(IndexError, match="beyond the 40 logits"):
            native_loss.softmax_nll_(torch.randn(1, 40), torch.tensor([wrong]), None, None)


@pytest.fixture
def without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(machine, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(machine, "cpp_compiler_problem", lambda: "no C++ compiler is installed")
    native_training.library.cache_clear()
    yield
    native_training.library.cache_clear()


@pytest.mark.usefixtures("natively")
def test_torch_computes_where_there_is_no_compiler(request: pytest.FixtureRequest) -> None:
    """The same loss and gradients, and a note."""
    config = replace(TINY, head_dim=16)

    def gradients() -> tuple[float, Tensors]:
        model = tiny_model(config).train()
        loss = model.nll_sum(random_batch(3, 40))
        loss.backward()
        return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]

    loss, expected = gradients()
    request.getfixturevalue("without_a_compiler")
    notes = Notes()
    with progress.using(notes):
        other, found = gradients()
    assert other == pytest.approx(loss, rel=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert notes.texts == [
        "attention, experts, state spaces and the loss go through torch in training, more slowly: "
        "no C++ compiler is installed\nhint: install g++"
    ]
