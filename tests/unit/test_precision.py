"""fp16 with its loss scale, float8, and which precision a machine gets."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mule import machine, progress
from mule.adapters.lora import add_lora
from mule.batch import IGNORE, Batch
from mule.config.adapter import LoraSection
from mule.config.schema import OptimSection
from mule.errors import ConfigError, ModelError, UserError
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.models.loss import nll_sum
from mule.models.recompute import Recompute
from mule.train import assemble
from mule.train.distributed import ALONE, Group
from mule.train.float8 import use_float8
from mule.train.optim import Optimizer
from mule.train.precision import DTYPES, check_fits_fp16
from mule.train.scaler import LossScaler
from mule.train.step import NonFiniteStep, Overflow, StepResult, train_step
from tests.tiny import TINY, part, random_batch, tiny_model
from tests.unit.test_resolve import recipe, resolved

ROUND = dataclasses.replace(TINY, hidden_size=32, head_dim=8, intermediate_size=48, num_layers=2)
ROWS, LENGTH = 8, 13


class Trainer:
    """A tiny model in one precision, with what trains it."""

    def __init__(self, precision: str, config: ModelConfig = TINY, *, emulate: bool = True) -> None:
        self.model = tiny_model(config)
        if precision == "fp8":
            self.num_float8 = use_float8(self.model, emulate=emulate)
        self.optimizer = Optimizer(self.model, OptimSection(), dtype=DTYPES[precision])
        self.scaler = LossScaler(ROWS * LENGTH) if precision == "fp16" else None

    def update(self, seed: int = 0, cut: int = ROWS, **more: Any) -> StepResult:
        batch = random_batch(ROWS, LENGTH, seed=seed, trained=0.8)
        parts = [part(batch, slice(i, i + cut)) for i in range(0, ROWS, cut)]
        more = {"lr": 3e-3, "max_grad_norm": 1.0, "scaler": self.scaler} | more
        return train_step(self.model, self.optimizer, parts, **more)

    def losses(self, updates: int) -> list[float]:
        return [self.update(seed % 3).loss for seed in range(updates)]

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all that an update changes."""
        named = {f"working.{name}": p for name, p in self.model.named_parameters()}
        named |= {f"master.{name}": t for name, t in self.optimizer.master_weights().items()}
        return {name: t.detach().clone() for name, t in (named | self.optimizer.moments()).items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


# ---------------------------------------------------------------- the loss scale


@pytest.mark.parametrize(("tokens", "bound"), [(1, 1), (2, 2), (104, 128), (8192, 8192)])
def test_the_scale_starts_at_2_to_the_16_of_the_mean_loss(tokens: int, bound: int) -> None:
    scaler = LossScaler(tokens)
    assert scaler.scale == 2**16 and scaler.factor == 2**16 / bound


def test_the_scale_halves_at_once_and_doubles_after_2000_good_updates() -> None:
    scaler = LossScaler(64)
    for _ in range(1999):
        scaler.applied()
    scaler.overflowed()
    assert (scaler.scale, scaler.num_overflows) == (2**15, 1)
    for _ in range(1999):  # counted from the overflow
        scaler.applied()
    assert scaler.scale == 2**15
    scaler.applied()
    assert scaler.scale == 2**16
    for _ in range(2000):
        scaler.applied()
    assert (scaler.scale, scaler.num_overflows) == (2**17, 1)


def test_a_scale_changes_no_bit_where_nothing_over_or_underflows() -> None:
    """In fp32, all of it: powers of two go in and come out again."""
    states = []
    for scale in (2.0**16, 2.0**3):
        trainer = Trainer("fp32")
        trainer.scaler = LossScaler(ROWS * LENGTH)
        trainer.scaler.scale = scale
        results = [trainer.update(seed, cut=size) for seed, size in enumerate((8, 4, 1))]
        states.append((results, trainer.state()))
    assert states[0][0] == states[1][0]
    assert_equal(states[0][1], states[1][1])
    plain = Trainer("fp32")
    for seed, (size, scaled) in enumerate(zip((8, 4, 1), states[0][0])):
        result = plain.update(seed, cut=size)
        assert result.loss == pytest.approx(scaled.loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(scaled.grad_norm, rel=1e-5)


# ---------------------------------------------------------------- fp16


def test_fp16_learns_as_fp32_does() -> None:
    fp16, fp32 = Trainer("fp16"), Trainer("fp32")
    for ours, theirs in zip(fp16.losses(30), fp32.losses(30), strict=True):
        assert ours == pytest.approx(theirs, abs=4e-3)  # 5e-4 was seen
    assert fp16.scaler is not None and fp16.scaler.num_overflows == 0
    masters = fp16.optimizer.master_weights()
    for name, parameter in fp16.model.named_parameters():
        assert parameter.grad is not None
        assert parameter.dtype == parameter.grad.dtype == torch.float16
        assert masters[name].dtype == torch.float32
        assert torch.equal(parameter, masters[name].half())


def test_softmax_that_vanishes_in_fp16_is_scaled_before_it_is_rounded() -> None:
    """The logit of each target is 20 above the others, which get 2e-9 of the probability each."""
    targets = torch.tensor([[2, IGNORE, 4]])
    hidden = 20 * nn.functional.one_hot(targets.clamp(min=0), 5).float()  # (1, 3, 5)
    gradients = {}
    for name, dtype, scale in (
        ("fp32", torch.float32, 1.0),
        ("unscaled", torch.float16, 1.0),
        ("scaled", torch.float16, 2.0**24),
    ):
        h, weight = hidden.to(dtype, copy=True).requires_grad_(), torch.eye(5, dtype=dtype)
        nll_sum(h, weight, targets, grad_scale=scale).backward()
        assert h.grad is not None
        gradients[name] = h.grad.float() / scale
    assert gradients["fp32"].count_nonzero() == 8
    assert gradients["unscaled"].count_nonzero() == 0
    torch.testing.assert_close(gradients["scaled"], gradients["fp32"], rtol=1e-3, atol=0)


def sure(precision: str) -> tuple[Trainer, Batch]:
    """A model that is so sure of its targets that the gradient is below what fp16 can hold."""
    trainer = Trainer(precision)
    with torch.no_grad():
        trainer.optimizer.master_weights()["model.norm.weight"].fill_(60.0)
        trainer.optimizer.refresh_working_weights()
        batch = random_batch(ROWS, LENGTH)
        first, second = trainer.model(batch.input_ids).float().topk(2).values.unbind(-1)
        answers = trainer.model(batch.input_ids).argmax(-1)
    batch.targets.copy_(torch.where(first - second > 19, answers, IGNORE))
    return trainer, batch


def test_a_gradient_that_underflows_without_the_scale_survives_with_it() -> None:
    norms = {}
    for name, precision in (("fp32", "fp32"), ("unscaled", "fp16"), ("scaled", "fp16")):
        trainer, batch = sure(precision)
        assert 3 <= int((batch.targets != IGNORE).sum()) < ROWS * LENGTH
        scaler = trainer.scaler if name == "scaled" else None
        settings = {"lr": 1e-3, "max_grad_norm": 1.0, "scaler": scaler}
        norms[name] = train_step(trainer.model, trainer.optimizer, [batch], **settings).grad_norm
    assert 0 < norms["fp32"] < 1e-6 and norms["unscaled"] == 0
    assert norms["scaled"] == pytest.approx(norms["fp32"], rel=0.1)


@pytest.mark.parametrize("cut", [ROWS, 4])
def test_an_overflow_is_skipped_and_halves_the_scale(cut: int) -> None:
    trainer = Trainer("fp16")
    assert trainer.scaler is not None
    trainer.update(cut=cut)
    trainer.scaler.scale = 2.0**30
    before = trainer.state()
    with pytest.raises(Overflow) as caught:
        trainer.update(cut=cut)
    assert str(caught.value) == (
        "gradient beyond fp16 at loss scale 1,073,741,824, now 536,870,912"
    )
    assert_equal(trainer.state(), before)
    assert (trainer.scaler.scale, trainer.scaler.num_overflows) == (2.0**29, 1)
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)
    while trainer.scaler.scale > 2.0**16:
        try:
            result = trainer.update(cut=cut)
        except Overflow:
            continue
        break
    assert math.isfinite(result.grad_norm) and trainer.scaler.num_overflows > 2
    assert not torch.equal(
        before["exp_avg.model.norm.weight"], trainer.state()["exp_avg.model.norm.weight"]
    )


@pytest.mark.parametrize(
    ("scale", "poison", "says"),
    [
        (1.0, "gradient", r"^loss 4\.\d+, gradient norm (inf|nan)$"),
        (
            2.0**16,
            "weight",
            r"^loss nan, gradient norm nan; activations may be beyond fp16, which ends at 65,504$",
        ),
    ],
)
def test_what_no_scale_can_help_is_not_an_overflow(scale: float, poison: str, says: str) -> None:
    trainer = Trainer("fp16")
    assert trainer.scaler is not None
    trainer.scaler.scale = scale
    norm = trainer.model.model.norm.weight
    if poison == "gradient":
        norm.register_hook(lambda g: g * math.inf)
    else:
        norm.data[0] = math.nan
    with pytest.raises(NonFiniteStep, match=says):
        trainer.update()
    assert (trainer.scaler.scale, trainer.scaler.num_overflows) == (scale, 0)


def test_a_resumed_fp16_run_is_bit_identical() -> None:
    """Also when it was stopped between an overflow and the next growth."""

    def run(trainer: Trainer, updates: range) -> list[Any]:
        log = []
        for seed in updates:
            try:
                log.append(trainer.update(seed % 3))
            except Overflow as skipped:
                log.append(str(skipped))
        return log

    whole, first, second = Trainer("fp16"), Trainer("fp16"), Trainer("fp16")
    for trainer in (whole, first):
        assert trainer.scaler is not None
        trainer.scaler.scale, trainer.scaler._num_good = 2.0**26, 0
    assert first.scaler is not None and second.scaler is not None
    log = run(whole, range(20))
    assert any("beyond fp16" in str(entry) for entry in log)
    begun = run(first, range(9))
    with torch.no_grad():
        saved = first.optimizer.master_weights() | first.optimizer.moments()
        found = second.optimizer.master_weights() | second.optimizer.moments()
        for name, tensor in found.items():
            tensor.copy_(saved[name])
    second.optimizer.num_updates = first.optimizer.num_updates
    second.optimizer.refresh_working_weights()
    second.scaler.load(json.loads(json.dumps(first.scaler.state())))
    assert begun + run(second, range(9, 20)) == log
    assert whole.scaler is not None and second.scaler.state() == whole.scaler.state()
    assert_equal(second.state(), whole.state())


class Threads(Group):
    """Processes that are threads: sums wait for one another."""

    world_size = 2

    def __init__(self, rank: int, meeting: threading.Barrier, given: list[Any]) -> None:
        self.rank, self._meeting, self._given = rank, meeting, given

    def sum_(self, tensor: torch.Tensor) -> None:
        self._given[self.rank] = tensor.clone()
        self._meeting.wait()
        torch.add(*self._given, out=tensor)
        self._meeting.wait()


def test_all_processes_skip_the_update_that_overflows_in_one() -> None:
    trainers, meeting, given = (
        [Trainer("fp16") for _ in range(2)],
        threading.Barrier(2),
        [None, None],
    )
    said: dict[int, list[Any]] = {0: [], 1: []}

    def be(rank: int) -> None:
        trainer, group = trainers[rank], Threads(rank, meeting, given)
        norm = trainer.model.model.norm.weight
        handle = norm.register_hook(lambda g: g * math.inf) if rank else None
        for seed in range(3):
            batch = part(random_batch(ROWS, LENGTH, seed=seed), slice(*((0, 5), (5, 8))[rank]))
            settings = {"lr": 3e-3, "max_grad_norm": 1.0, "scaler": trainer.scaler}
            try:
                said[rank].append(
                    train_step(trainer.model, trainer.optimizer, [batch], group=group, **settings)
                )
            except Overflow as skipped:
                said[rank].append(str(skipped))
            if handle:
                handle.remove()

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said[0][0] == "gradient beyond fp16 at loss scale 65,536, now 32,768"
    assert said[0] == said[1]
    assert_equal(trainers[0].state(), trainers[1].state())
    alone = Trainer("fp16")
    for seed, together in ((1, said[0][1]), (2, said[0][2])):
        batch = random_batch(ROWS, LENGTH, seed=seed)
        settings = {"lr": 3e-3, "max_grad_norm": 1.0, "scaler": alone.scaler}
        one = train_step(alone.model, alone.optimizer, [batch], **settings)
        assert one.num_targets == together.num_targets
        assert one.loss == pytest.approx(together.loss, abs=1e-3)
        assert one.grad_norm == pytest.approx(together.grad_norm, rel=1e-2)


def test_a_weight_beyond_fp16_is_refused() -> None:
    model = tiny_model()
    check_fits_fp16(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[2, 3], weight[5, 7] = 7e4, -1e5
    with pytest.raises(ModelError) as caught:
        check_fits_fp16(model)
    assert str(caught.value) == (
        "train.precision = fp16 cannot hold 2 of the 960 values of "
        "model.layers.1.mlp.up_proj.weight: fp16 ends at 65,504\n"
        "hint: set train.precision=bf16, or fp32 where bf16 is slow"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # read by torch.compile
@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_compiled_is_as_eager(precision: str) -> None:
    eager, compiled = Trainer(precision, ROUND), Trainer(precision, ROUND)
    compiled.model.compile_regions()
    torch._dynamo.utils.counters.clear()
    for seed in range(4):
        if compiled.scaler is not None and eager.scaler is not None and seed == 2:
            eager.scaler.scale = compiled.scaler.scale = 2.0**12  # must not compile anew
            torch.compiler.set_stance("fail_on_recompile")
        a, b = eager.update(seed), compiled.update(seed)
        assert a.loss == pytest.approx(b.loss, abs=5e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=2e-2)
    torch.compiler.set_stance("default")
    assert not torch._dynamo.utils.counters["graph_break"]


# ---------------------------------------------------------------- float8


def float8_layers(model: Decoder) -> list[str]:
    return [n for n, m in model.named_modules() if type(m).__name__ == "Float8Linear"]


def test_float8_learns_as_bf16_does() -> None:
    """With products rounded to float8: emulated, as no CPU computes them."""
    bf16, fp8 = Trainer("bf16", ROUND), Trainer("fp8", ROUND)
    ours, theirs = fp8.losses(20), bf16.losses(20)
    assert ours != theirs and theirs[-1] < theirs[0] - 0.4
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=0.06)  # 0.023 was seen


def test_float8_keeps_parameters_names_and_flat_buffers() -> None:
    trainer, plain = Trainer("fp8", ROUND), Trainer("bf16", ROUND)
    model, optimizer = trainer.model, trainer.optimizer
    assert trainer.num_float8 == len(float8_layers(model)) == 7 * ROUND.num_layers
    assert type(model.lm_head) is nn.Linear
    assert list(model.state_dict()) == list(plain.model.state_dict())
    assert list(optimizer.master_weights()) == list(plain.optimizer.master_weights())
    assert list(optimizer.moments()) == list(plain.optimizer.moments())
    before = trainer.state()
    trainer.update(lr=1e-2)
    masters = optimizer.master_weights()
    for name, parameter in model.named_parameters():
        assert not torch.equal(masters[name], before[f"master.{name}"]), name
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, masters[name].bfloat16()), name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_float8_computed_again_is_the_same(recompute: Recompute) -> None:
    kept, again = Trainer("fp8", ROUND), Trainer("fp8", ROUND)
    again.model.train().set_training(recompute=recompute)
    assert kept.losses(3) == again.losses(3)
    assert_equal(kept.state(), again.state())


def test_float8_leaves_layers_alone_that_it_cannot_take() -> None:
    sink = _Notes()
    with progress.using(sink):
        odd = tiny_model(dataclasses.replace(ROUND, intermediate_size=40))
        assert use_float8(odd, emulate=True) == 4 * ROUND.num_layers
        assert not [name for name in float8_layers(odd) if "mlp" in name]
        assert sink.notes == [
            "float8: 6 of 14 layers stay in bf16, since 16 does not divide their dimensions"
        ]
        lora = tiny_model(ROUND)
        add_lora(lora, LoraSection(r=16))
        assert use_float8(lora, emulate=True) == 7 * ROUND.num_layers
        assert not [name for name in float8_layers(lora) if "lora_" in name]
    assert len(sink.notes) == 1
    with pytest.raises(UserError) as caught:
        use_float8(tiny_model(), emulate=True)
    assert str(caught.value) == (
        "train.precision = fp8 changes nothing: 16 does not divide the dimensions of any layer\n"
        "hint: set train.precision=bf16"
    )


class _Notes(progress.Silence):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, level: str = "info") -> None:
        self.notes.append(text)


def test_float8_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "torchao.float8", raising=False)
    with pytest.raises(UserError) as caught:
        use_float8(tiny_model(ROUND))
    assert str(caught.value) == (
        "train.precision = fp8 needs torchao, which is not installed\n"
        "hint: pip install 'mule[fp8]', or set train.precision=bf16"
    )


@pytest.mark.slow
def test_torchao_is_loaded_without_a_word() -> None:
    code = (
        "import logging\n"
        "from mule.train.float8 import _torchao_float8\n"
        "_torchao_float8()\n"
        "assert logging.root.manager.disable == 0\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


# ---------------------------------------------------------------- which precision


def test_fp16_is_for_gpus_without_bf16_and_for_who_asks() -> None:
    found = resolved(cuda=True, cuda_bf16=False)
    assert found.recipe.train.precision == "fp16"
    assert found.reasons["train.precision"] == (
        "this GPU has no bf16 instructions (capability below 8.0)"
    )
    assert resolved("train.device=cpu", cuda=True, cuda_bf16=False).recipe.train.precision == "bf16"
    for facts in ({}, {"cuda": True}, {"mps": True}):
        assert resolved("train.precision=fp16", **facts).recipe.train.precision == "fp16"


def test_fp8_needs_its_hardware() -> None:
    found = resolved("train.precision=fp8", cuda=True, float8=True)
    assert found.recipe.train.precision == "fp8"
    for words, facts in (
        ([], {}),
        ([], {"cuda": True}),
        (["train.device=cpu"], {"cuda": True, "float8": True}),
    ):
        with pytest.raises(ConfigError) as caught:
            resolved("train.precision=fp8", *words, **facts)
        assert str(caught.value) == (
            "train.precision = fp8 needs a CUDA device of capability 8.9 or newer; there is none\n"
            "hint: set train.precision=bf16"
        )


def test_the_peak_is_of_the_precision_that_will_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        machine,
        "matmul_peak",
        lambda dtype, *_: asked.append(dtype) or 1e12,  # type: ignore[func-returns-value]
    )
    shards: Any = SimpleNamespace(
        num_rows=9, row_length=8, num_targets=50, num_examples=9, isolated=False, kind="text"
    )
    fast = "bf16" if machine.has_fast_bf16() else "fp32"
    for precision, expected in (("auto", fast), ("fp16", "fp16"), ("fp32", "fp32"), ("fp8", "fp8")):
        words = ["train.device=cpu", f"train.precision={precision}"]
        assemble.machine_facts(shards, recipe(*words).train, ALONE)
        assert asked.pop() == expected


def test_peaks_of_fp16_and_fp8(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured: list[torch.dtype] = []
    monkeypatch.setattr(machine, "_measure_peak", lambda _, dtype: measured.append(dtype) or 1e11)
    for name in ("fp16", "bf16", "fp8"):
        assert machine.matmul_peak(name) == 1e11
    assert measured == [torch.float16, torch.bfloat16]  # that of fp8 was known
