"""Blocks with experts, compiled: one graph for all of them, no breaks, no recompilation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mule.config.schema import OptimSection
from mule.models import native_training
from mule.models.config import ModelConfig, Routing
from mule.models.recompute import Recompute
from mule.train.optim import Optimizer
from mule.train.step import train_step
from tests.tiny import random_batch
from tests.unit.test_moe import MIXED, SHARED, alone, mixture

CASES: dict[str, tuple[ModelConfig, Routing, Recompute]] = {
    "dropless": (MIXED, Routing(), "none"),
    "bias, shared, selective": (SHARED, Routing("bias", bias_rate=0.01), "selective"),
    "reroute, full": (MIXED, Routing(capacity_factor=1.0, overflow="reroute"), "full"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.mark.parametrize("case", CASES)
def test_updates_make_one_graph(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several updates, whose routing, bias and number of dropped tokens differ."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config, routing, recompute = CASES[case]
    rows, losses = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = mixture(routing, config, recompute=recompute)
        assert model.balance is not None
        optimizer = Optimizer(model, OptimSection())
        if compiled:
            model.compile_regions()
        for step in range(4):
            batches = [random_batch(2, 24, seed=seed) for seed in (step, step + 10)]
            found = train_step(model, optimizer, batches, lr=1e-3, max_grad_norm=1.0)
            losses.append((found.loss, found.grad_norm))
        rows.append(model.balance.report(alone))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and not counters["recompiles"]
    is_loss_compiled = native_training.library() is None
    assert counters["stats"]["unique_graphs"] == 1 + is_loss_compiled  # a block, and the loss
    eager, made = losses[:4], losses[4:]
    for one, other in zip(eager, made, strict=True):
        assert one == pytest.approx(other, rel=2e-3)
    assert rows[0]["layers"] == rows[1]["layers"] == [0, 1, 2]
    for key in ("entropy", "z_loss", "aux_loss"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=2e-3)
