"""The convolution and the decays of Mamba-2 in C++: beside fp64 by definition, and torch's own way."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mule.models import native_mamba, native_training
from mule.models.causal_conv import CausalConv
from mule.models.ssd import Inputs, ssd

pytestmark = pytest.mark.skipif(native_training.library() is None, reason="needs g++ on Linux")
KINDS = (torch.float32, torch.bfloat16)
Tensors = list[torch.Tensor]


def _made(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size) + seed))


def _segments(rows: int, length: int) -> torch.Tensor:
    """Documents of one token and of many; padding at the end of the last row."""
    segments = torch.ones(rows, length, dtype=torch.int64)
    segments[:, length // 3 :] = 2
    segments[0, length // 3 + 1 :] = 3
    segments[-1, -5:] = 0
    return segments


def _passed(function, tensors: Tensors, grad: torch.Tensor) -> Tensors:
    """The result and the gradients of all tensors."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def _assert_near(found: Tensors, exact: Tensors, dtype: torch.dtype) -> None:
    for one, other in zip(found, exact, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < (1e-6 if dtype == torch.float32 else 8e-3)


# ---------------------------------------------------------------- the convolution


def _convolved(x, weight, bias, segments):  # type: ignore[no-untyped-def]
    """By definition, in the precision of x."""
    rows, length, _ = x.shape
    z = torch.zeros_like(x) if bias is None else bias.expand(x.shape)
    taps = weight.shape[-1]
    out = []
    for token in range(length):
        total = z[:, token]
        for back in range(min(taps, token + 1)):
            same = torch.ones(rows, 1, dtype=x.dtype)
            if segments is not None:
                same = (segments[:, token] == segments[:, token - back])[:, None].to(x.dtype)
            total = total + same * x[:, token - back] * weight[:, 0, taps - 1 - back]
        out.append(total)
    return F.silu(torch.stack(out, 1))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("has_documents", [True, False])
def test_a_convolution(taps: int, dtype: torch.dtype, has_documents: bool) -> None:
    x = _made(2, 37, 100).to(dtype)[..., 2:82]  # a part of something wider
    weight, bias, grad = (
        _made(80, 1, taps).to(dtype),
        _made(80).to(dtype),
        _made(2, 37, 80).to(dtype),
    )
    segments = _segments(2, 37) if has_documents else None
    assert native_mamba.convolves(x, weight)
    found = _passed(
        lambda *given: native_mamba.causal_conv(*given, segments), [x, weight, bias], grad
    )
    exact = _passed(
        lambda *given: _convolved(*given, segments),
        [tensor.double() for tensor in (x, weight, bias)],
        grad.double(),
    )
    _assert_near(found, exact, dtype)


def test_a_convolution_without_a_bias_and_its_module() -> None:
    module = CausalConv(48, 4, bias=False)
    torch.nn.init.normal_(module.weight)
    x, segments = _made(2, 20, 48), _segments(2, 20)
    exact = _convolved(x, module.weight, None, segments)
    torch.testing.assert_close(module(x, segments), exact, rtol=1e-5, atol=1e-5)
    narrow = CausalConv(24, 4, bias=False)  # no whole vectors: torch computes
    torch.nn.init.normal_(narrow.weight)
    assert not native_mamba.convolves(x[..., :24], narrow.weight)
    exact = _convolved(x[..., :24], narrow.weight, None, segments)
    torch.testing.assert_close(narrow(x[..., :24], segments), exact, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the decays


def _decayed(scores, log_decay, segments):  # type: ignore[no-untyped-def]
    """By definition, in the precision of the scores."""
    size = scores.shape[-1]
    visible = torch.ones(size, size, dtype=torch.bool).tril()
    if segments is not None:
        same = segments[..., :, None] == segments[..., None, :]
        visible = (visible & same)[:, :, None, None]
    decay = log_decay.permute(0, 1, 3, 4, 2)
    differences = decay[..., :, None] - decay[..., None, :]
    return scores[:, :, :, None] * differences.masked_fill(~visible, -math.inf).exp()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("has_documents", [True, False])
def test_decays(dtype: torch.dtype, has_documents: bool) -> None:
    rows, chunks, size, groups, heads = 2, 2, 48, 2, 3
    scores = _made(rows, chunks, groups, size, size).to(dtype)
    log_decay = -_made(rows, chunks, size, groups, heads).abs().cumsum(2)
    grad = _made(rows, chunks, groups, heads, size, size).to(dtype)
    segments = (
        _segments(rows, chunks * size).unflatten(1, (chunks, size)) if has_documents else None
    )
    found = _passed(
        lambda *given: native_mamba.decayed(*given, segments), [scores, log_decay], grad
    )
    exact = _passed(
        lambda *given: _decayed(*given, segments),
        [scores.double(), log_decay.double()],
        grad.double(),
    )
    _assert_near(found, exact, dtype)


def test_what_would_overflow_is_never_seen() -> None:
    """Decays so strong that their inverse is beyond fp32, and logits that are no numbers there."""
    log_decay = -300.0 * torch.arange(32.0)[None, None, :, None, None]
    scores = torch.ones(1, 1, 1, 32, 32)
    scores[..., 0, 1] = math.nan  # above the diagonal
    y, *grads = _passed(
        lambda *given: native_mamba.decayed(*given, None),
        [scores, log_decay],
        torch.ones(1, 1, 1, 1, 32, 32),
    )
    assert y[0, 0, 0, 0].tril(-1).abs().max() < 1e-37  # e^-300, as small as fp32 has it
    assert torch.equal(y[0, 0, 0, 0].triu(1), torch.zeros(32, 32))
    assert torch.equal(y[0, 0, 0, 0].diagonal(), torch.ones(32))
    assert all(grad.isfinite().all() for grad in grads)


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    x, weight, bias = _made(2, 40, 112).to(dtype), _made(112, 1, 4).to(dtype), _made(112).to(dtype)
    scores, log_decay = _made(2, 3, 1, 32, 32).to(dtype), -_made(2, 3, 32, 1, 5).abs().cumsum(2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            conv = _passed(
                lambda *given: native_mamba.causal_conv(*given, _segments(2, 40)),
                [x, weight, bias],
                x.flip(0),
            )
            decayed = _passed(
                lambda *given: native_mamba.decayed(*given, None),
                [scores, log_decay],
                _made(2, 3, 1, 5, 32, 32).to(dtype),
            )
            found.append([*conv, *decayed])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_the_recurrence_is_what_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, b, c = _made(2, 70, 1, 3, 8), _made(2, 70, 1, 16, seed=1), _made(2, 70, 1, 16, seed=2)
    inputs = Inputs(x, _made(2, 70, 1, 3).sigmoid(), -torch.rand(1, 3), b, c)
    ours, state = ssd(inputs, 32, segments=_segments(2, 70))
    monkeypatch.setattr(native_mamba, "decays", lambda _: False)
    exact, exact_state = ssd(inputs, 32, segments=_segments(2, 70))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, exact_state)
