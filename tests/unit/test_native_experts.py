"""The experts in C++: beside fp64, with experts that get nothing, and on other threads."""

from __future__ import annotations

import pytest
import torch

from mule.models import experts, native_experts, native_training, torch_experts

KINDS = (torch.float32, torch.bfloat16)
# tokens, hidden channels, channels inside an expert, experts, of a token
SHAPES = ((37, 32, 32, 3, 2), (5, 64, 96, 8, 2), (301, 96, 160, 4, 1), (700, 224, 64, 2, 2))
Tensors = list[torch.Tensor]

pytestmark = pytest.mark.skipif(native_training.library() is None, reason="needs g++ on Linux")


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """x, weights, gate_up, down and the gradient of y; and which experts, E for none."""
    tokens, hidden, inner, count, top_k = shape
    generator = torch.Generator().manual_seed(tokens)

    def made(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    given = [
        *(made(tokens, hidden), made(tokens, top_k).sigmoid()),
        *(made(count, 2 * inner, hidden) / 8, made(count, hidden, inner) / 8),
        made(tokens, hidden),
    ]
    assigned = torch.randint(0, count + 1, (tokens, top_k), generator=generator)
    assigned[assigned == 1] = 0  # the second expert gets nothing
    return [tensor.to(dtype) for tensor in given], assigned


def _passed(given: Tensors, assigned: torch.Tensor) -> Tensors:
    """y and the gradients, as training computes them."""
    *inputs, grad_y = [tensor.detach().requires_grad_() for tensor in given]
    x, weights, gate_up, down = inputs
    y = experts.apply_experts(x, weights, assigned, gate_up, down)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


def _exact(given: Tensors, assigned: torch.Tensor) -> Tensors:
    """The same in fp64, by definition."""
    *inputs, grad_y = [tensor.detach().double().requires_grad_() for tensor in given]
    x, weights, gate_up, down = inputs
    y = torch.zeros_like(x)
    for expert in range(len(down)):
        gate, up = (x @ gate_up[expert].T).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up) @ down[expert].T
        share = (weights * (assigned == expert)).sum(-1, keepdim=True)
        y = y + share * out
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_beside_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given, assigned = _inputs(shape, dtype)
    assert native_experts.serves(given[0], given[3])
    for found, exact in zip(_passed(given, assigned), _exact(given, assigned), strict=True):
        error = (found.double() - exact).norm() / exact.norm()
        assert error < (1e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_what_no_expert_takes(dtype: torch.dtype) -> None:
    given, assigned = _inputs(SHAPES[0], dtype)
    assigned[:] = 3
    assert not any(tensor.any() for tensor in _passed(given, assigned))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    given, assigned = _inputs(SHAPES[3], dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_passed(given, assigned))
    finally:
        torch.set_num_threads(before)
    # Products in fp32 are torch's, whose bits may: of gate and up here, not of what is between.
    tolerance = 0.0 if dtype == torch.bfloat16 and native_experts.multiplies_bf16() else 1e-6
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not native_experts.multiplies_bf16(), reason="needs avx512_bf16")
def test_a_row_depends_on_no_other() -> None:
    given, assigned = _inputs(SHAPES[2], torch.bfloat16)
    y = _passed(given, assigned)[0]
    alone = [given[0][40:41], given[1][40:41], *given[2:4], given[4][40:41]]
    assert torch.equal(_passed(alone, assigned[40:41])[0], y[40:41])


def test_widths_that_are_no_whole_vectors() -> None:
    given, assigned = _inputs((20, 40, 24, 3, 2), torch.float32)
    assert not native_experts.serves(given[0], given[3])
    assert experts._kernels(given[0], given[3]) == (torch_experts, torch_experts)
    for found, exact in zip(_passed(given, assigned), _exact(given, assigned), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given, assigned = _inputs(SHAPES[1], torch.float32)
    ours = _passed(given, assigned)
    monkeypatch.setattr(native_experts, "serves", lambda *_: False)
    for one, other in zip(ours, _passed(given, assigned), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
