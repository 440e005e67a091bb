"""Runs of models with state-space layers: killed and resumed to the very same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from mule.models.folder import load_model
from mule.run import Run
from tests.life.tiny_life import Forker, outcome, write_data

TRAIN = ("train", "pretrain.yaml", "train.steps=9", "data.document_mask=true")
HEADS = "num_heads: 4, num_kv_heads: 1, head_dim: 10,\n  "
MODELS = {
    "mamba2": "family: granitemoehybrid, mamba: {head_dim: 8, state_size: 6, chunk_size: 16},",
    "hybrid": f"family: granitemoehybrid, mamba: {{attention_every: 2, head_dim: 8}}, {HEADS}",
    "mamba1": "family: jamba, mamba: {state_size: 4},",
}


def trained(forker: Forker, folder: Path, kind: str, die_at: int | None = None) -> None:
    write_data(folder)
    recipe = folder / "pretrain.yaml"
    text = recipe.read_text().replace(HEADS, "").replace("family: qwen3,", MODELS[kind])
    recipe.write_text(text)
    words = TRAIN
    if die_at is not None:
        assert forker.run(folder, *words, die_at=die_at) == -signal.SIGKILL
        words += ("--resume",)
    assert forker.run(folder, *words) == 0, (folder / "output.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_killed_and_resumed(forker: Forker, tmp_path: Path, kind: str) -> None:
    trained(forker, tmp_path / "whole", kind)
    calls = int((tmp_path / "whole" / "durable_calls").read_text())
    trained(forker, tmp_path / "killed", kind, die_at=calls // 2)
    whole, killed = (tmp_path / name / "runs" / "pretrain" for name in ("whole", "killed"))
    assert outcome(killed) == outcome(whole)
    assert Run.open(killed).attempt == 2
    [*_, weights] = sorted(whole.glob("checkpoint-*/config.json"))
    config = load_model(weights.parent).config
    assert len(config.mamba_layers) == (1 if kind == "hybrid" else 2)
