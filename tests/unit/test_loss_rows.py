"""The loss's kernels for a CPU without compiled code: in C++, and in torch a few rows at once."""

from __future__ import annotations

import pytest
import torch

from mule.batch import IGNORE
from mule.models import loss, native_loss
from mule.models.loss import nll_of_targets, softmax_nll_, softmax_nll_by_rows_


@pytest.fixture(params=["native", "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native_loss, "serves", lambda _logits: False)
    elif not native_loss.serves(torch.zeros(1)):
        pytest.skip("no C++ compiler")
    return request.param


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [None, torch.tensor(8.0)])
def test_the_same_loss_and_gradient(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    softcap: float | None,
    scale: torch.Tensor | None,
) -> None:
    """Rows in threes and a rest of one; the last ones only fill the batch up."""
    monkeypatch.setattr(loss, "_CACHED_LOGITS", 3 * 601)
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(10, 601, generator=generator) * 4).to(dtype)
    targets = torch.randint(0, 601, (10,), generator=generator)
    targets[[2, 9]] = IGNORE
    plain, by_rows = logits.clone(), logits.clone()
    expected = softmax_nll_(plain, targets, scale, softcap=softcap)
    found = softmax_nll_by_rows_(by_rows, targets, scale, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(by_rows, plain, rtol=tolerance, atol=1e-6)
    assert not by_rows[[2, 9]].any() and by_rows[0].any()


def test_few_logits_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_loss, "serves", lambda _logits: False)
    logits = torch.randn(7, 89, generator=torch.Generator().manual_seed(1))
    targets, other = torch.arange(7), logits.clone()
    assert torch.equal(softmax_nll_by_rows_(logits, targets), softmax_nll_(other, targets))
    assert torch.equal(logits, other)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_loss_of_each_target(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    """Chunks of five targets, their logits in twos."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(loss, "_CACHED_LOGITS", 2 * 89)
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(*n, generator=generator) for n in ((3, 7, 11), (89, 11)))
    targets = torch.randint(0, 89, (3, 7), generator=generator)
    targets[0, 2:] = targets[2, 1] = IGNORE
    found = nll_of_targets(hidden, weight, targets, softcap)
    logits = hidden @ weight.T
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    places = (targets != IGNORE).nonzero().tolist()
    expected = [-logits[b, t].log_softmax(-1)[targets[b, t]] for b, t in places]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert nll_of_targets(hidden, weight, torch.full_like(targets, IGNORE), softcap).shape == (0,)
