"""Runs with experts: killed, they go on to the very same bits; several processes train as one."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mule.run import Run
from tests.life.harness_ranks import Ranks
from tests.life.tiny_life import Forker, outcome, write_data

TRAIN = (
    *("train", "pretrain.yaml", "model.intermediate_size=null"),
    *("model.moe.num_experts=5", "model.moe.intermediate_size=32"),
)
STEPS = "train.steps=12"
PLAIN = ("model.family=qwen3_moe",)
BIAS = (
    *("model.family=granitemoeshared", "model.moe.shared_intermediate_size=64"),
    *("model.moe.balance=bias", "model.moe.bias_rate=0.003"),
)
CAPACITY = (
    *(*PLAIN, "model.moe.capacity_factor=1", "model.moe.overflow=reroute"),
    *("optim.kind=muon", "model.moe.balance=none"),
)
RUN = Path("runs") / "pretrain"


def moe_rows(run: Run) -> list[dict[str, Any]]:
    return [{"step": row["step"]} | row["moe"] for row in run.metrics() if "moe" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(BIAS, id="bias"),
        pytest.param(CAPACITY, id="capacity"),
    ],
)
def test_a_killed_run_goes_on_identically(
    forker: Forker, tmp_path: Path, words: tuple[str, ...]
) -> None:
    outcomes, rows = [], []
    for name, die in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        write_data(folder)
        if die:
            die_at = int((tmp_path / "whole" / "durable_calls").read_text()) * 2 // 3
            assert forker.run(folder, *TRAIN, STEPS, *words, die_at=die_at) == -signal.SIGKILL
            assert Run.open(folder / RUN).latest_checkpoint() is not None
        code = forker.run(folder, *TRAIN, STEPS, *words, *(["--resume"] if die else []))
        assert code == 0, (folder / "output.log").read_text()
        outcomes.append(outcome(folder / RUN))
        rows.append(moe_rows(Run.open(folder / RUN)))
    assert outcomes[0] == outcomes[1]
    assert "routing.safetensors" in outcomes[0]["hashes"]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [5, 10, 12]
    tokens = [sum(row["tokens_per_expert"][0]) for row in rows[0]]
    assert tokens == [n * 6 * 48 * 2 for n in (5, 5, 2)]
    saved = load_file(
        Run.open(tmp_path / "killed" / RUN).checkpoints()[-1][1] / "routing.safetensors"
    )
    assert bool(saved["bias"].any()) is (words is BIAS)
    assert saved["wanted"].dtype == torch.int64


def test_a_folder_of_a_run_is_one_of_transformers(forker: Forker, tmp_path: Path) -> None:
    """With the experts apart, as the hub has them, and without a trace of the bias."""
    write_data(tmp_path)
    code = forker.run(tmp_path, *TRAIN, *PLAIN, "train.steps=1", "model.moe.balance=bias")
    assert code == 0, (tmp_path / "output.log").read_text()
    _, folder = Run.open(tmp_path / RUN).checkpoints()[-1]
    weights = load_file(folder / "model.safetensors")
    expert = {name for name in weights if ".layers.1.mlp.experts.4." in name}
    start = "model.layers.1.mlp.experts.4."
    assert expert == {f"{start}{part}_proj.weight" for part in ("gate", "up", "down")}
    assert not [name for name in weights if "bias" in name]
    raw = json.loads((folder / "config.json").read_text())
    assert raw["architectures"] == ["Qwen3MoeForCausalLM"] and raw["norm_topk_prob"] is True


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize(
    "words",
    [(*PLAIN, "model.moe.balance=none"), BIAS, (*PLAIN, *CAPACITY[3:])],
    ids=["z-loss", "bias", "muon"],
)
def test_two_processes_train_as_one(
    ranks: Ranks, tmp_path: Path, words: tuple[str, ...], sharding: str
) -> None:
    """Without a limit to the experts, and but for the auxiliary loss, which is each process's own."""
    found = []
    for size, more in ((1, ()), (2, (f"train.sharding={sharding}",))):
        folder = tmp_path / str(size)
        write_data(folder)
        ended = ranks.run(folder, size, *TRAIN, STEPS, "train.precision=fp32", *words, *more)
        assert ended.codes == [0] * size, ended.texts
        run = Run.open(folder / RUN)
        found.append(([row["loss"] for row in run.metrics()], moe_rows(run)))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-4)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        for counts, others in zip(one["tokens_per_expert"], other["tokens_per_expert"]):
            assert sum(counts) == sum(others)
            assert counts == pytest.approx(others, abs=0.02 * sum(counts))
