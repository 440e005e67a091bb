"""The recurrences of state-space layers, against fp64 and one token after the other."""

from __future__ import annotations

import pytest
import torch

from mule.models.selective_scan import selective_scan
from mule.models.ssd import Inputs, ssd, ssd_step
from tests.tiny_mamba import sequential_scan, sequential_ssd


def made_inputs(length: int, *, fastest: float = 0.3, seed: int = 1) -> Inputs:
    rows, groups, heads, channels, states = 2, 2, 3, 5, 7
    g = torch.Generator().manual_seed(seed)
    return Inputs(
        torch.randn(rows, length, groups, heads, channels, generator=g),
        torch.rand(rows, length, groups, heads, generator=g) * fastest,
        -1 - 15 * torch.rand(groups, heads, generator=g),
        torch.randn(rows, length, groups, states, generator=g),
        torch.randn(rows, length, groups, states, generator=g),
    )


def made_segments(rows: int, length: int) -> torch.Tensor:
    """Documents of all lengths, one token too, and padding behind the last."""
    g = torch.Generator().manual_seed(3)
    begins = torch.rand(rows, length, generator=g) < 0.1
    segments = begins.cumsum(1) + 1
    segments[0, -5:] = 0
    return segments


@pytest.mark.parametrize("length, chunk", [(1, 16), (16, 16), (45, 16), (45, 64), (130, 32)])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
def test_chunks_equal_the_recurrence(length: int, chunk: int, apart: bool, goes_on: bool) -> None:
    inputs = made_inputs(length)
    segments = made_segments(2, length) if apart else None
    state = torch.randn(2, 2, 7, 15) if goes_on else None
    wanted, last = sequential_ssd(inputs, segments, state)
    y, found = ssd(inputs, chunk, segments=segments, state=state)
    torch.testing.assert_close(y.double(), wanted, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.double(), last, atol=2e-5, rtol=0)
    assert wanted.std() > 0.2


def test_steps_equal_the_recurrence() -> None:
    inputs = made_inputs(30)
    wanted, last = sequential_ssd(inputs)
    state, found = torch.zeros(2, 2, 7, 15), []
    for t in range(30):
        one = Inputs(*(x if x is inputs.a else x[:, t : t + 1] for x in inputs))
        y, state = ssd_step(one, state)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1).double(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.double(), last, atol=1e-5, rtol=0)


def test_gradients_equal_those_of_the_recurrence() -> None:
    inputs, segments = made_inputs(45), made_segments(2, 45)
    weight = torch.randn(2, 45, 2, 3, 5)

    def gradients(inputs: Inputs, chunked: bool) -> tuple[torch.Tensor, ...]:
        inputs = Inputs(*(tensor.requires_grad_() for tensor in inputs))
        y, _ = ssd(inputs, 16, segments=segments) if chunked else sequential_ssd(inputs, segments)
        return torch.autograd.grad((y * weight).sum(), list(inputs))

    wanted = gradients(Inputs(*(tensor.double() for tensor in inputs)), chunked=False)
    for found, right in zip(gradients(inputs, chunked=True), wanted, strict=True):
        assert (found - right).norm() <= 1e-5 * right.norm()


def test_fast_decays_overflow_nowhere() -> None:
    """exp of what lies above the diagonal would be infinite, and its gradient no number."""
    inputs = Inputs(*(tensor.requires_grad_() for tensor in made_inputs(64, fastest=200.0)))
    y, _ = ssd(inputs, 64)
    gradients = torch.autograd.grad(y.square().sum(), list(inputs))
    assert y.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(y.double(), sequential_ssd(inputs)[0], atol=5e-2, rtol=0)


def test_in_bf16_decays_and_states_stay_fp32() -> None:
    """All in bf16 the error would be more than thrice as large."""
    inputs = made_inputs(512, fastest=0.1)
    wanted, _ = sequential_ssd(inputs)
    halves = inputs._replace(x=inputs.x.bfloat16(), b=inputs.b.bfloat16(), c=inputs.c.bfloat16())
    y, state = ssd(halves, 64)
    assert y.dtype == state.dtype == torch.float32
    assert (y - wanted).norm() < 7e-3 * wanted.norm()


def made_scan(length: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    dt = torch.rand(2, length, 12, generator=g) * 0.5
    dtx = torch.randn(2, length, 12, generator=g)
    a = -1 - 15 * torch.rand(12, 5, generator=g)
    b, c = torch.randn(2, 2, length, 5, generator=g)
    begins = torch.rand(2, length, generator=g) < 0.1
    return (dt, dtx, a, b, c), begins, torch.randn(2, 12, 5, generator=g)


@pytest.mark.parametrize("length", [1, 16, 37])
def test_the_scan_and_its_gradients_equal_the_recurrence(length: int) -> None:
    tensors, begins, state = made_scan(length)
    weight = torch.randn(2, length, 12)
    doubles = tuple(tensor.double().requires_grad_() for tensor in tensors)
    tensors = tuple(tensor.requires_grad_() for tensor in tensors)
    wanted, last = sequential_scan(doubles, begins, state)
    y, _, found = selective_scan(list(tensors), begins, state, False)
    torch.testing.assert_close(y.double(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.double(), last, atol=1e-5, rtol=0)
    right = torch.autograd.grad((wanted * weight).sum(), doubles)
    for one, other in zip(torch.autograd.grad((y * weight).sum(), tensors), right, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_the_scan_is_a_well_formed_operation() -> None:
    tensors, begins, state = made_scan(19)
    arguments = ([tensor.requires_grad_() for tensor in tensors], begins, state, False)
    torch.library.opcheck(selective_scan, arguments, test_utils=("test_schema", "test_faketensor"))
