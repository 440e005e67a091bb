"""The optimizer's rules against the libraries that define them, and its state to the last bit."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mule.config.load import load_recipe
from mule.config.schema import OptimSection
from mule.errors import ConfigError, UserError
from mule.models.decoder import Decoder
from mule.plan.resolve import resolve
from mule.train.optim import Optimizer
from mule.train.step import train_step
from tests.tiny import TINY, part, random_batch, tiny_model
from tests.unit.test_resolve import FACTS

KINDS = ("adamw", "muon", "adamw8bit")
# Some matrices of 4,096 elements and more, which get 8-bit moments, and some of fewer.
CONFIG = dataclasses.replace(
    TINY, hidden_size=70, intermediate_size=104, head_dim=18, num_layers=2, tie_embeddings=False
)
BETAS, EPS = (0.8, 0.9), 1e-6


def model_of(seed: int = 1) -> Decoder:
    return tiny_model(CONFIG, seed=seed)


def settings(kind: str, **more: Any) -> OptimSection:
    return OptimSection(
        kind=kind,  # type: ignore[arg-type]
        weight_decay=0.3,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        **more,
    )


def gradients(model: Decoder, step: int) -> dict[str, torch.Tensor]:
    """Made-up gradients, the same for every model of this shape; very long and short ones too."""
    draw = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=draw) * 10.0 ** (step % 5 - 3)
        for name, p in model.named_parameters()
    }


def put(model: Decoder, found: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        assert p.grad is not None
        p.grad.copy_(found[name])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    kinds = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def state_of(model: Decoder, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """All that a run is made of."""
    return {
        **{f"working.{name}": p for name, p in model.named_parameters()},
        **{f"master.{name}": t for name, t in optimizer.master_weights().items()},
        **optimizer.moments(),
    }


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(bits(found[name]), bits(tensor)), (
            name
        )


def in_blocks(name: str, p: torch.Tensor) -> bool:
    return name.startswith("model.layers.") and p.dim() == 2


def large(name: str, p: torch.Tensor) -> bool:
    return p.dim() == 2 and p.numel() >= 4096 and "embed_tokens" not in name


def torch_adamw(named: list[tuple[str, Any]], lr: float) -> torch.optim.AdamW:
    """PyTorch's, with decay on matrices that are not embeddings."""
    decayed = [p for n, p in named if p.dim() == 2 and n != "model.embed_tokens.weight"]
    kept = [p for n, p in named if p.dim() == 1 or n == "model.embed_tokens.weight"]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS)


def run_beside(
    optimizer: Optimizer, model: Decoder, reference: Decoder, theirs: list[torch.optim.Optimizer]
) -> None:
    """50 updates of both with the same gradients, ours told to make them shorter; exactly so."""
    for step in range(50):
        found, scale = gradients(model, step), 0.5 ** (step % 3)
        put(model, found)
        optimizer.step(lr=0.02, grad_scale=scale)
        for name, p in reference.named_parameters():
            p.grad = found[name] * scale
        for other in theirs:
            other.step()


def test_adamw_is_torchs() -> None:
    model, reference = model_of(), model_of()
    optimizer = Optimizer(model, settings("adamw"))
    theirs = torch_adamw(list(reference.named_parameters()), 0.02)
    run_beside(optimizer, model, reference, [theirs])
    for (name, ours), (_, other) in zip(model.named_parameters(), reference.named_parameters()):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5, msg=name)
    moments = optimizer.moments()
    for name, p in reference.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(moments[f"{kind}.{name}"], theirs.state[p][kind])


def test_muon_is_torchs_on_the_blocks_matrices_and_adamw_elsewhere() -> None:
    model, reference = model_of(), model_of()
    optimizer = Optimizer(model, settings("muon", momentum=0.9))
    named = list(reference.named_parameters())
    matrices = [p for n, p in named if in_blocks(n, p)]
    muon = torch.optim.Muon(
        matrices, lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch_adamw([(n, p) for n, p in named if not in_blocks(n, p)], 0.02)
    run_beside(optimizer, model, reference, [muon, adamw])
    kinds = set()
    for (name, ours), (_, other) in zip(model.named_parameters(), named):
        if in_blocks(name, ours):
            assert torch.equal(ours, other), name
            momentum = optimizer.moments()[f"momentum.{name}"]
            assert torch.equal(momentum, muon.state[other]["momentum_buffer"]), name
        else:
            torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5, msg=name)
            assert f"exp_avg.{name}" in optimizer.moments()
        kinds.add((in_blocks(name, ours), ours.dim()))
    assert kinds == {(True, 2), (False, 2), (False, 1)}


def test_adamw8bit_is_bitsandbytes_and_small_tensors_are_adamw() -> None:
    from bitsandbytes.optim import AdamW8bit

    model, reference = model_of(), model_of()
    optimizer = Optimizer(model, settings("adamw8bit"))
    named = list(reference.named_parameters())
    eight = AdamW8bit(
        [p for n, p in named if large(n, p)], lr=0.02, betas=BETAS, eps=EPS, weight_decay=0.3
    )
    adamw = torch_adamw([(n, p) for n, p in named if not large(n, p)], 0.02)
    run_beside(optimizer, model, reference, [eight, adamw])
    moments = optimizer.moments()
    num_large = 0
    for (name, ours), (_, other) in zip(model.named_parameters(), named):
        if not large(name, other):
            torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5, msg=name)
            assert moments[f"exp_avg.{name}"].dtype == torch.float32
            continue
        assert torch.equal(ours, other), name
        state = eight.state[other]
        for mine, its in (("exp_avg", "1"), ("exp_avg_sq", "2")):
            assert torch.equal(moments[f"{mine}.{name}"], state[f"state{its}"])
            assert torch.equal(moments[f"{mine}_absmax.{name}"], state[f"absmax{its}"])
        num_large += 1
    assert num_large == 11  # of the 14 matrices of two blocks, all but k_proj and v_proj; the head


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_bf16_are_used_in_fp32(kind: str) -> None:
    """An update in bf16 moves the masters as one in fp32 that has the same gradients."""
    masters = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of()
        optimizer = Optimizer(model, settings(kind), dtype=dtype)
        for step in range(3):
            rounded = {name: g.bfloat16() for name, g in gradients(model, step).items()}
            put(model, rounded)
            optimizer.step(lr=0.02, grad_scale=0.7)
            if dtype == torch.bfloat16:
                for name, p in model.named_parameters():
                    assert torch.equal(p, optimizer.master_weights()[name].bfloat16())
        masters.append(state_of(model, optimizer))
    names = [name for name in masters[0] if not name.startswith("working.")]
    assert_same_bits({n: masters[1][n] for n in names}, {n: masters[0][n] for n in names})


def train(model: Decoder, optimizer: Optimizer, steps: range, parts: int) -> list[float]:
    losses = []
    for step in steps:
        batch = random_batch(4, 11, seed=step)
        cuts = range(0, 4, 4 // parts)
        batches = [part(batch, slice(i, i + 4 // parts)) for i in cuts]
        losses.append(train_step(model, optimizer, batches, lr=0.01, max_grad_norm=0.5).loss)
    return losses


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_goes_on_to_the_same_bits(
    tmp_path: Path, kind: str, dtype: torch.dtype, parts: int
) -> None:
    model = model_of()
    optimizer = Optimizer(model, settings(kind, ema_decay=0.8), dtype=dtype)
    train(model, optimizer, range(3), parts)
    for name, tensors in (("m", optimizer.master_weights()), ("o", optimizer.moments())):
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / name)
    losses = train(model, optimizer, range(3, 6), parts)

    again = model_of(seed=9)
    resumed = Optimizer(again, settings(kind, ema_decay=0.8), dtype=dtype)
    for name, tensors in (("m", resumed.master_weights()), ("o", resumed.moments())):
        saved = load_file(tmp_path / name)
        assert saved.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == saved[key].dtype
            tensor.copy_(saved[key])
    resumed.num_updates = 3
    resumed.refresh_working_weights()
    assert train(again, resumed, range(3, 6), parts) == losses
    assert_same_bits(state_of(again, resumed), state_of(model, optimizer))
    assert resumed.digest() == optimizer.digest()
    assert resumed.num_updates == optimizer.num_updates == 6


@pytest.mark.parametrize(
    ("dtype", "compiled"), [("float32", [True] * 2), ("bfloat16", [True, False])]
)
def test_what_stays_fp32_is_not_compiled_for_beside_bf16(dtype: str, compiled: list[bool]) -> None:
    """One graph serves all groups: another type of weight would be compiled for again."""
    model = torch.nn.Linear(4, 4, bias=False)
    model.register_parameter("D", torch.nn.Parameter(torch.ones(4)))
    mixer = torch.nn.ModuleDict({"mixer": model})
    made = Optimizer(mixer, settings("adamw"), dtype=getattr(torch, dtype), compiled=True)
    assert [rule.compiled for rule in made._rules] == compiled


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_changes_with_any_bit(kind: str) -> None:
    model = model_of()
    optimizer = Optimizer(model, settings(kind, ema_decay=0.8), dtype=torch.bfloat16)
    train(model, optimizer, range(2), 1)
    before = optimizer.digest()
    draw = torch.Generator().manual_seed(4)
    state = {**optimizer.master_weights(), **optimizer.moments()}
    for name, tensor in state.items():
        flat = tensor.reshape(-1)
        assert flat.data_ptr() == tensor.data_ptr()
        words = flat.view({4: torch.int32, 1: torch.uint8}[tensor.element_size()])
        place = int(torch.randint(len(words), (), generator=draw))
        bit = int(torch.randint(8 * tensor.element_size(), (), generator=draw))
        mask = torch.tensor(1 << bit).to(words.dtype)
        words[place] ^= mask
        assert optimizer.digest() != before, (name, bit)
        words[place] ^= mask
    assert optimizer.digest() == before


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_the_state(kind: str, ema_decay: float | None) -> None:
    model = model_of()
    expected = 0
    for name, p in model.named_parameters():
        num = -(-p.numel() // 64) * 64  # each starts on a cache line
        moments = 8 * num
        if kind == "muon" and in_blocks(name, p):
            moments = 4 * num
        if kind == "adamw8bit" and large(name, p):
            moments = 2 * num + 8 * -(-p.numel() // 256)
        expected += 4 * num + moments + (4 * num if ema_decay else 0)
    optimizer = Optimizer(model, settings(kind, ema_decay=ema_decay))
    assert optimizer.state_bytes() == expected
    train(model, optimizer, range(1), 2)
    assert optimizer.state_bytes() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_learns(kind: str) -> None:
    model = model_of()
    optimizer = Optimizer(model, settings(kind), dtype=torch.bfloat16)
    batch = random_batch(4, 11)
    losses = [
        train_step(model, optimizer, [batch], lr=0.01, max_grad_norm=1.0).loss for _ in range(12)
    ]
    assert losses[-1] < 0.6 * losses[0]


@pytest.fixture
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    yield


def test_without_bitsandbytes(no_bitsandbytes: None) -> None:
    for kind in ("adamw", "muon"):
        Optimizer(model_of(), settings(kind))
    with pytest.raises(UserError, match=r"adamw8bit needs bitsandbytes, which cannot be") as found:
        Optimizer(model_of(), settings("adamw8bit"))
    assert found.value.hint == "pip install 'mule[qlora]', or set optim.kind=adamw"


def test_what_a_kind_cannot_do_is_refused() -> None:
    words = ["data.train=[a.txt]", "model.size=2m", "optim.kind=muon"]
    resolve(load_recipe(None, words).recipe, TINY, FACTS)
    lora = load_recipe(None, [*words, "adapter.kind=lora"]).recipe
    with pytest.raises(ConfigError, match="muon trains whole matrices; the two factors") as found:
        resolve(lora, TINY, FACTS)
    assert found.value.hint.startswith("set optim.kind=adamw, or")
    eight = load_recipe(None, [*words[:2], "optim.kind=adamw8bit"]).recipe
    resolve(eight, TINY, FACTS)
    with pytest.raises(ConfigError, match="no such update for Apple GPUs") as found:
        resolve(eight, TINY, dataclasses.replace(FACTS, mps=True))
    assert found.value.hint == "set optim.kind=adamw, or train.device=cpu"
