"""Runs of every kind of adapter: killed and resumed to the same bits, by several processes, begun
with another adapter; and a run with frozen weights."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mule import fsio
from mule.adapters.identity import recorded_quantization
from mule.run import Run
from tests.life.harness_ranks import Ranks
from tests.life.tiny_life import CHAT_RECIPE, LORA, Forker, outcome, write_data

STEPS = ("train.steps=8", "evaluate.every_steps=4")


@pytest.fixture(scope="module")
def base(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run, the base of all others."""
    folder = tmp_path_factory.mktemp("base")
    write_data(folder)
    code = forker.run(folder, "train", "pretrain.yaml", "train.steps=4", "train.precision=fp32")
    assert code == 0, (folder / "output.log").read_text()
    return folder / "runs" / "pretrain"


def prepare(folder: Path, base: Path, adapter: str = LORA) -> Path:
    write_data(folder)
    (folder / "lora.yaml").write_text(CHAT_RECIPE.replace("BASE", str(base)) + adapter)
    return folder


def said(folder: Path) -> str:
    return " ".join((folder / "output.log").read_text().split())


def train(forker: Forker, folder: Path, *words: str, **options: Any) -> dict[str, Any]:
    code = forker.run(folder, "train", "lora.yaml", *STEPS, *words, **options)
    assert code == 0, said(folder)
    return outcome(folder / "runs" / "lora")


KINDS = {
    "pissa": ("adapter.lora.init=pissa", "adapter.lora.use_rslora=true"),
    "qlora": ("adapter.kind=qlora", "adapter.lora.use_dora=true", "train.precision=bf16"),
    "last": ("adapter.lora.last_layers=1", "adapter.lora.use_dora=true", "train.precision=bf16"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "qlora")) for kind in KINDS]
)
def test_killed_and_resumed(forker: Forker, base: Path, tmp_path: Path, kind: str) -> None:
    whole, killed = (prepare(tmp_path / name, base) for name in ("whole", "killed"))
    expected = train(forker, whole, *KINDS[kind])
    calls = int((whole / "durable_calls").read_text())
    words = ("train", "lora.yaml", *STEPS, *KINDS[kind])
    assert forker.run(killed, *words, die_at=calls // 2) == -signal.SIGKILL
    assert train(forker, killed, *KINDS[kind], "--resume") == expected
    losses = [row[1] for row in expected["log"]]
    assert losses[-1] < losses[0]
    folder = Run.open(whole / "runs" / "lora").checkpoints()[-1][1]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == (6 if kind == "pissa" else 3)
    assert config["layers_to_transform"] == ([1] if kind == "last" else None)
    quantized = {"qlora": "nf4, double quantised"}.get(kind)
    assert recorded_quantization(folder) == quantized


def test_the_size_of_the_adapter_is_told(forker: Forker, base: Path, tmp_path: Path) -> None:
    folder = prepare(tmp_path, base)
    code = forker.run(folder, "train", "lora.yaml", *STEPS, "adapter.lora.init=pissa", "--json")
    assert code == 0, said(folder)
    text = (folder / "output.log").read_text()
    summary = json.loads(text[text.index("\n{") :])
    checkpoint = Run.open(folder / "runs" / "lora").checkpoints()[-1][1]
    tensors = load_file(checkpoint / "adapter_model.safetensors").values()
    assert summary["adapter_bytes"] == sum(4 * tensor.numel() for tensor in tensors)
    assert f"the adapter takes {summary['adapter_bytes'] / 1e3:.0f} KB" in said(folder)


@pytest.mark.slow
def test_qlora_by_two_processes(ranks: Ranks, base: Path, tmp_path: Path) -> None:
    """As by one, in packed rows; each has the whole base in 4 bits."""
    losses = []
    for world_size in (1, 2):
        folder = prepare(tmp_path / str(world_size), base)
        words = (*STEPS, "adapter.kind=qlora", "adapter.lora.dropout=0")
        ended = ranks.run(folder, world_size, "train", "lora.yaml", *words)
        assert ended.codes == [0] * world_size, ended.texts
        assert "(the blocks' matrices in 4 bits)" in ended.texts[0]
        losses.append([row["loss"] for row in Run.open(folder / "runs" / "lora").metrics()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_pissa_by_two_processes(ranks: Ranks, base: Path, tmp_path: Path) -> None:
    """All begin with the vectors that the first one found."""
    losses = []
    for world_size in (1, 2):
        folder = prepare(tmp_path / str(world_size), base)
        words = (*STEPS, "adapter.lora.init=pissa", "adapter.lora.dropout=0")
        ended = ranks.run(folder, world_size, "train", "lora.yaml", *words)
        assert ended.codes == [0] * world_size, ended.texts
        losses.append([row["loss"] for row in Run.open(folder / "runs" / "lora").metrics()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_a_warm_start(forker: Forker, base: Path, tmp_path: Path) -> None:
    """The weights and nothing else; resumed without the adapter it began with."""
    old = prepare(tmp_path / "old", base)
    train(forker, old)
    adapter = old / "runs" / "lora"
    last = Run.open(adapter).checkpoints()[-1][1] / "adapter_model.safetensors"
    folder = prepare(tmp_path / "new", base)
    words = (f"adapter.warm_start={adapter}", "train.seed=9")
    expected = train(forker, folder, *words)
    run = Run.open(folder / "runs" / "lora")
    lineage = fsio.read_json(run.folder / "lineage.json")
    assert lineage["warm_start"] == {"path": str(adapter), "sha256": fsio.sha256_file(last)}
    fresh = prepare(tmp_path / "fresh", base)
    cold = train(forker, fresh, "train.seed=9")
    assert expected["log"][0][1] < cold["log"][0][1] - 0.1  # the first loss
    assert expected["log"][0][3] == cold["log"][0][3]  # the schedule begins anew

    killed = prepare(tmp_path / "killed", base)
    die_at = int((folder / "durable_calls").read_text()) // 2
    given = ("train", "lora.yaml", *STEPS, *words)
    assert forker.run(killed, *given, die_at=die_at) == -signal.SIGKILL
    shutil.rmtree(adapter)
    assert train(forker, killed, *words, "--resume") == expected


def test_a_warm_start_that_does_not_fit(forker: Forker, base: Path, tmp_path: Path) -> None:
    old = prepare(tmp_path / "old", base)
    train(forker, old)
    words = ("train", "lora.yaml", "--name", "new", f"adapter.warm_start={old / 'runs' / 'lora'}")
    assert forker.run(old, *words, "adapter.lora.r=5") == 2
    assert "adapter.lora.r is 5, that of " in said(old) and "set adapter.lora.r=3; or" in said(old)
    assert not (old / "runs" / "new").exists()
    assert forker.run(old, *words, f"adapter.warm_start={base}") == 2
    assert "given twice" in said(old)


def test_frozen_weights(forker: Forker, base: Path, tmp_path: Path) -> None:
    """Killed, resumed, and in the end still the base's."""
    patterns = "train.freeze=['model.embed_tokens.*', 'model.layers.0.*']"
    words = (patterns, "train.precision=bf16")
    whole, killed = (prepare(tmp_path / name, base, "") for name in ("whole", "killed"))
    expected = train(forker, whole, *words)
    die_at = int((whole / "durable_calls").read_text()) // 2
    given = ("train", "lora.yaml", *STEPS, *words)
    assert forker.run(killed, *given, die_at=die_at) == -signal.SIGKILL
    assert train(forker, killed, *words, "--resume") == expected
    before = load_file(Run.open(base).checkpoints()[-1][1] / "model.safetensors")
    checkpoint = Run.open(whole / "runs" / "lora").checkpoints()[-1][1]
    after = load_file(checkpoint / "model.safetensors")
    for name, tensor in before.items():
        is_frozen = name.startswith(("model.embed_tokens.", "model.layers.0."))
        assert tensor.equal(after[name]) is is_frozen, name
