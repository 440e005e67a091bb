"""Training steps on a CUDA card: equal to the CPU's, compiled whole, and in every precision.

`pytest tests/gpu` needs the tree only, no network and no data; minutes on an H100.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator

import pytest
import torch

from mule.batch import Batch
from mule.config.schema import OptimSection
from mule.models.decoder import Decoder, empty_decoder
from mule.train.optim import Optimizer
from mule.train.scaler import LossScaler
from mule.train.step import StepResult, train_step
from tests.gpu.marks import NEEDS_CUDA
from tests.tiny import TINY, part, random_batch, tiny_model

pytestmark = NEEDS_CUDA
DEVICE = "cuda"
CUDA = torch.device(DEVICE)
# Dimensions that 16 divides, as float8 asks for; still pairwise distinct.
WIDE = dataclasses.replace(
    TINY, vocab_size=352, hidden_size=128, head_dim=64, intermediate_size=320, num_layers=2
)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """fp32 products in fp32, and nothing compiled left over."""
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _optimizer(model: Decoder, dtype: torch.dtype = torch.float32) -> Optimizer:
    # With so large an eps an update is about linear in the gradient, whose rounding it shows.
    return Optimizer(model, OptimSection(eps=1e-2), dtype=dtype)


def _step(
    model: Decoder, optimizer: Optimizer, batches: list[Batch], lr: float = 1e-2
) -> StepResult:
    return train_step(model, optimizer, batches, lr=lr, max_grad_norm=1.0)


def test_an_update_equals_the_cpus() -> None:
    batch = random_batch(5, 33, trained=0.7)
    halves = [part(batch, slice(0, 3)), part(batch, slice(3, 5))]
    results, weights = [], []
    for device in ("cpu", DEVICE):
        model = tiny_model().to(device).train()
        optimizer = _optimizer(model)
        parts = [half.to(torch.device(device)) for half in halves]
        results.append(_step(model, optimizer, parts, lr=0.5))
        weights.append({n: t.cpu() for n, t in optimizer.master_weights().items()})
    cpu, cuda = results
    assert cuda.num_targets == cpu.num_targets
    assert cuda.loss == pytest.approx(cpu.loss, rel=1e-5)
    assert cuda.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-4)
    start = tiny_model().state_dict()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=0)
        assert (weight - start[name]).abs().max() > 1e-3, "an update that shows nothing"


@pytest.mark.parametrize("length", [96, 600])  # below and above where the CPU drops its mask
def test_packed_documents_are_kept_apart_as_on_the_cpu(length: int) -> None:
    config = dataclasses.replace(TINY, max_position_embeddings=1024)
    batch = _packed(3, length)
    losses, gradients = [], []
    for device in ("cpu", DEVICE):
        model = tiny_model(config).to(device).train()
        nll = model.nll_sum(batch.to(torch.device(device)))
        nll.backward()
        losses.append(float(nll.detach()))
        gradients.append(
            {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4 * scale, rtol=1e-3)


def test_what_one_document_says_does_not_reach_another() -> None:
    batch = _packed(2, 96)
    changed = dataclasses.replace(batch, input_ids=batch.input_ids.clone())
    changed.input_ids[:, :30] = 0  # the first document of each row is 30 tokens long
    model = tiny_model().to(CUDA)
    with torch.no_grad():
        before, after = (model._hidden(b.to(CUDA))[:, 30:] for b in (batch, changed))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("default")  # the compiler's own are not the point here
@pytest.mark.parametrize("isolated", [False, True])
def test_blocks_compile_once_and_whole(isolated: bool) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    model = tiny_model(WIDE).to(CUDA).train()
    optimizer = _optimizer(model, torch.bfloat16)
    eager = _step(model, optimizer, [_batch(isolated)])
    model = tiny_model(WIDE).to(CUDA).train()
    optimizer = _optimizer(model, torch.bfloat16)
    model.compile_regions()
    compiled = _step(model, optimizer, [_batch(isolated)])
    assert compiled.loss == pytest.approx(eager.loss, rel=1e-3)
    assert compiled.grad_norm == pytest.approx(eager.grad_norm, rel=2e-2)
    assert not counters["graph_break"], dict(counters["graph_break"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = _step(model, optimizer, [_batch(isolated)])
    assert again.loss < compiled.loss


def test_fp16_is_scaled_and_follows_fp32() -> None:
    batch = random_batch(6, 40).to(CUDA)
    losses: dict[torch.dtype, list[float]] = {}
    for dtype in (torch.float32, torch.float16):
        model = tiny_model(WIDE).to(CUDA).train()
        optimizer = _optimizer(model, dtype)
        scaler = LossScaler(batch.targets.numel()) if dtype == torch.float16 else None
        losses[dtype] = [
            train_step(model, optimizer, [batch], lr=1e-2, max_grad_norm=1.0, scaler=scaler).loss
            for _ in range(5)
        ]
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=5e-3)
    assert losses[torch.float16][-1] < losses[torch.float16][0]


def test_float8_follows_bf16() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 products need compute capability 8.9 (Ada, Hopper)")
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    from mule.train.float8 import use_float8

    losses = []
    for float8 in (False, True):
        model = tiny_model(WIDE)
        if float8:
            assert use_float8(model) == 7 * WIDE.num_layers
        model = model.to(CUDA).train()
        optimizer = _optimizer(model, torch.bfloat16)
        batch = random_batch(6, 48).to(CUDA)
        losses.append([_step(model, optimizer, [batch]).loss for _ in range(5)])
    bf16, fp8 = losses
    assert fp8 == pytest.approx(bf16, rel=2e-2)
    assert fp8[-1] < fp8[0]


def test_an_update_waits_for_the_device_once_however_it_is_cut() -> None:
    """Each wait leaves the card idle while the next kernels are launched."""
    model = tiny_model().to(CUDA).train()
    optimizer = _optimizer(model)
    whole = random_batch(8, 32)
    waits = []
    for parts in (1, 4):
        cuts = [part(whole, slice(i, i + 8 // parts)) for i in range(0, 8, 8 // parts)]
        batches = [cut.to(CUDA) for cut in cuts]
        _step(model, optimizer, batches)  # what happens once only is over
        waits.append(_num_waits(model, optimizer, batches))
    assert waits[1] == waits[0], f"{waits[0]} waits for one part, {waits[1]} for four"


def _num_waits(model: Decoder, optimizer: Optimizer, batches: list[Batch]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            _step(model, optimizer, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in found)


def _batch(isolated: bool) -> Batch:
    return (_packed(4, 96) if isolated else random_batch(4, 96)).to(CUDA)


def _packed(rows: int, length: int) -> Batch:
    """Rows of three documents, the first of 30 tokens, and five places of padding."""
    plain = random_batch(rows, length, trained=0.8)
    segments = torch.ones_like(plain.segments)
    segments[:, 30:], segments[:, 70:], segments[:, -5:] = 2, 3, 0
    positions = torch.arange(length).expand(rows, length).clone()
    positions[:, 30:] -= 30
    positions[:, 70:] -= 40
    targets = plain.targets.clone()
    targets[:, [29, 69]] = -100
    targets[:, -6:] = -100
    return Batch(plain.input_ids, targets, positions, segments, isolated=True)


def test_a_model_is_made_on_the_card_as_on_the_cpu() -> None:
    model = empty_decoder(TINY, torch.float32, DEVICE)
    model.init_weights(seed=1)
    for name, weight in tiny_model(seed=1).named_parameters():
        assert torch.equal(dict(model.named_parameters())[name].cpu(), weight), name
