"""Processes that hold the model in shares train what one process would."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mule import fsio
from mule.models.folder import load_model
from mule.run import Run
from tests.life.harness_ranks import TRAIN, Ranks, check_same, facts
from tests.life.tiny_life import CHAT_RECIPE, LORA, write_data

FULL = (*TRAIN, "train.sharding=full")
HYBRID = (*TRAIN, "train.sharding=hybrid")
RUN = Path("runs") / "pretrain"


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run by one process, which holds the whole model."""
    return run_of(ranks, tmp_path_factory.mktemp("alone"), 1, *TRAIN)


def run_of(
    ranks: Ranks, folder: Path, processes: int, *words: str, local_size: int | None = None
) -> dict[str, Any]:
    """The facts of an undisturbed run in a fresh folder."""
    write_data(folder)
    ended = ranks.run(folder, processes, *words, local_size=local_size)
    assert ended.codes == [0] * processes, ended.texts
    assert not any(ended.texts[1:])
    return facts(folder, processes)


@pytest.mark.slow
def test_a_kill_while_saving_and_another_number_goes_on(
    ranks: Ranks, alone: dict[str, Any], tmp_path: Path
) -> None:
    """Shares of 3 and 4 rows are one micro-batch and two: the passes must be made together."""
    write_data(tmp_path)
    fault = {"rank": 1, "step": 11, "kind": "save"}
    ended = ranks.run(tmp_path, 2, *FULL, "evaluate.prompts=[the cat]", fault=fault)
    assert ended.codes == [1, -signal.SIGKILL], ended.texts
    assert "another process of this run ended without a word" in ended.texts[0]
    run = Run.open(tmp_path / RUN)
    assert [step for step, _ in run.checkpoints()] == [4, 8] and run.state() == "failed"
    assert not list(run.folder.glob(".partial-*")), "the broken checkpoint is gone"
    assert run.samples()[0]["answers"].keys() == {"the cat"}
    check_folder(run.checkpoint_dir(8), num_parts=2)
    ended = ranks.run(tmp_path, 3, *FULL, "--resume")
    assert ended.codes == [0] * 3, ended.texts
    check_same(facts(tmp_path, 3), alone, from_step=8)
    check_folder(run.checkpoint_dir(20), num_parts=3)


@pytest.mark.slow
def test_a_full_disk_of_one_process_is_told_once(ranks: Ranks, tmp_path: Path) -> None:
    write_data(tmp_path)
    fault = {"rank": 1, "step": 7, "kind": "disk"}
    ended = ranks.run(tmp_path, 2, *FULL, fault=fault)
    assert ended.codes == [2, 2], ended.texts
    told = " ".join(ended.texts)
    assert told.count("no space left on the disk") == 1 and "Traceback" not in told, told
    run = Run.open(tmp_path / RUN)
    assert [step for step, _ in run.checkpoints()] == [4] and run.state() == "failed"
    assert not list(run.folder.glob(".partial-*"))


def check_folder(checkpoint: Path, num_parts: int) -> None:
    """A model folder for anyone, with the moments in parts, and no pickle in it."""
    fsio.verify_folder(checkpoint)
    model = load_model(checkpoint)
    with torch.no_grad():
        assert model(torch.tensor([[5, 7, 11]])).isfinite().all()
    parts = list((checkpoint / "optimizer").iterdir())
    assert len(parts) == num_parts
    assert {file.suffix for file in parts} == {".safetensors"}
    names = set()
    for file in parts:
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    masters = {name for name, _ in model.named_parameters()}
    assert names == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in masters}
    known = {".json", ".jinja", ".safetensors"}
    assert {file.suffix for file in checkpoint.rglob("*") if file.is_file()} <= known


def test_whole_becomes_shares(ranks: Ranks, alone: dict[str, Any], tmp_path: Path) -> None:
    """An error ends one process; two go on from its checkpoint."""
    write_data(tmp_path)
    fault = {"rank": 0, "step": 9, "kind": "error"}
    assert ranks.run(tmp_path, 1, *TRAIN, fault=fault).codes == [2]
    ended = ranks.run(tmp_path, 2, *FULL, "--resume")
    assert ended.codes == [0, 0], ended.texts
    check_same(facts(tmp_path, 2), alone, from_step=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "words", "local_size"),
    [
        (3, [*FULL, "train.micro_batch_rows=1"], None),
        (2, [*FULL, "train.activation_checkpointing=selective", "optim.ema_decay=0.9"], None),
        (4, HYBRID, 2),
        (4, FULL, 2),
    ],
)
def test_the_same_samples_and_losses(
    ranks: Ranks,
    alone: dict[str, Any],
    tmp_path: Path,
    processes: int,
    words: tuple[str, ...],
    local_size: int | None,
) -> None:
    found = run_of(ranks, tmp_path, processes, *words, local_size=local_size)
    check_same(found, alone)
    if "optim.ema_decay=0.9" in words:
        load_model(tmp_path / RUN / "ema")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "tolerance"), [(["optim.kind=muon"], 1e-3), (["optim.ema_decay=0.9"], 1e-5)]
)
def test_every_rule_works_on_shares(
    ranks: Ranks, tmp_path: Path, words: list[str], tolerance: float
) -> None:
    """From whole to shares and back: the moments are all there, under their names.

    Muon orthogonalises in bf16, where the last bit of a gradient can be seen.
    """
    whole = run_of(ranks, tmp_path / "whole", 1, *TRAIN, *words)
    write_data(tmp_path)
    fault = {"rank": 0, "step": 9, "kind": "error"}
    assert ranks.run(tmp_path, 1, *TRAIN, *words, fault=fault).codes == [2]
    fault = {"rank": 1, "step": 15, "kind": "error"}
    ended = ranks.run(tmp_path, 2, *FULL, *words, "--resume", fault=fault)
    assert ended.codes == [2, 2], ended.texts
    ended = ranks.run(tmp_path, 1, *TRAIN, *words, "--resume")
    assert ended.codes == [0], ended.texts
    check_losses(facts(tmp_path, 1), whole, tolerance)


def check_losses(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Training and validation losses of every update are equal but for `tolerance`."""
    figures = [
        [row.get(name, 0.0) for row in of["log"] for name in ("loss", "val_loss", "val_loss_ema")]
        for of in (found, expected)
    ]
    assert figures[0] == pytest.approx(figures[1], abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "compiled", "tolerance"), [("bf16", "false", 0.05), ("fp32", "true", 1e-5)]
)
def test_bf16_and_compiled(
    ranks: Ranks, tmp_path: Path, precision: str, compiled: str, tolerance: float
) -> None:
    short = ("train.steps=6", "checkpoint.every_steps=3", "evaluate.every_steps=3")
    base = ("train", "pretrain.yaml", *short, "train.step_rows=7", f"train.precision={precision}")
    whole = run_of(ranks, tmp_path / "whole", 1, *base)
    words = ("train.sharding=full", f"train.compile={compiled}")
    check_losses(run_of(ranks, tmp_path, 2, *base, *words), whole, tolerance)


@pytest.mark.slow
def test_a_copy_that_differs_is_found(ranks: Ranks, tmp_path: Path) -> None:
    """Two machines of two processes: the second has other weights after update 3."""
    write_data(tmp_path)
    fault = {"rank": 3, "step": 2, "kind": "weights"}
    ended = ranks.run(tmp_path, 4, *HYBRID, fault=fault, local_size=2)
    assert ended.codes == [1] * 4
    assert "the 4 processes do not have the weights after update 4 in common" in ended.texts[0]
    assert not Run.open(tmp_path / RUN).checkpoints()


@pytest.mark.slow
def test_an_adapter_in_shares(ranks: Ranks, alone: dict[str, Any], tmp_path: Path) -> None:
    """The frozen weights are divided too; matrices of 3 rows leave one of 4 processes nothing."""
    found = []
    base = alone["folder"] / RUN
    for processes, sharding in ((1, "none"), (4, "full")):
        folder = tmp_path / sharding
        write_data(folder)
        (folder / "lora.yaml").write_text(CHAT_RECIPE.replace("BASE", str(base)) + LORA)
        words = ("adapter.lora.dropout=0", f"train.sharding={sharding}")
        ended = ranks.run(folder, processes, "train", "lora.yaml", *words)
        assert ended.codes == [0] * processes, ended.texts
        run = Run.open(folder / "runs" / "lora")
        found.append({"log": run.metrics()})
        assert (run.checkpoints()[-1][1] / "adapter_model.safetensors").is_file()
    check_losses(found[1], found[0], 1e-5)
