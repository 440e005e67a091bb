"""Training with the frozen trunk kept gives the very bits of training without."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from mule.run import Run
from tests.life.harness_ranks import Ranks, facts
from tests.life.tiny_life import CHAT_RECIPE, LORA, Forker, outcome, write_data

TRAIN = ("train", "lora.yaml", "adapter.lora.last_layers=1")


@pytest.fixture(scope="module")
def base(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_data(folder)
    assert forker.run(folder, "train", "pretrain.yaml", "train.steps=4") == 0
    return folder / "runs" / "pretrain"


@pytest.fixture(scope="module")
def without(forker: Forker, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome without a cache, for each precision and number of rows at once."""
    found: dict[str, Any] = {}
    for words in ("train.precision=fp32", "train.precision=bf16", "train.micro_batch_rows=1"):
        folder = tmp_path_factory.mktemp("without")
        found[words] = trained(forker, folder, base, words, "adapter.trunk_cache=off")
    found["durable_calls"] = int((folder / "durable_calls").read_text())
    return found


def prepare(folder: Path, base: Path) -> Path:
    write_data(folder)
    (folder / "lora.yaml").write_text(CHAT_RECIPE.replace("BASE", str(base)) + LORA)
    return folder / "runs" / "lora"


def trained(forker: Forker, folder: Path, base: Path, *words: str) -> dict[str, Any]:
    run = prepare(folder, base)
    code = forker.run(folder, *TRAIN, *words)
    assert code == 0, (folder / "output.log").read_text()
    assert Run.open(run).metrics()[-1]["epoch"] > 1.5  # rows come again
    return outcome(run)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize(
    "words",
    [
        "train.precision=fp32",
        pytest.param("train.precision=bf16", marks=pytest.mark.slow),
        pytest.param("train.micro_batch_rows=1", marks=pytest.mark.slow),
    ],
)
def test_equal_bits(
    forker: Forker, base: Path, without: dict[str, Any], tmp_path: Path, where: str, words: str
) -> None:
    found = trained(forker, tmp_path, base, words, f"adapter.trunk_cache={where}")
    assert found == without[words]
    assert not list((tmp_path / "runs" / "lora").glob("trunk-*"))  # its run has ended


def test_it_is_on_by_itself(
    forker: Forker, base: Path, without: dict[str, Any], tmp_path: Path
) -> None:
    assert trained(forker, tmp_path, base) == without["train.precision=fp32"]
    told = (tmp_path / "output.log").read_text()
    assert "adapter.trunk_cache: memory; what the 1 frozen blocks make" in " ".join(told.split())
    assert "trunk_cache: memory" in (tmp_path / "runs" / "lora" / "resolved.yaml").read_text()


@pytest.mark.parametrize(
    "go_on", ["disk", *(pytest.param(how, marks=pytest.mark.slow) for how in ("memory", "off"))]
)
def test_killed_damaged_and_resumed(
    forker: Forker, base: Path, without: dict[str, Any], tmp_path: Path, go_on: str
) -> None:
    """What the killed process kept is read where it is whole, and computed where it is not."""
    run = prepare(tmp_path, base)
    words = (*TRAIN, "adapter.trunk_cache=disk")
    die_at = without["durable_calls"] * 3 // 5
    assert forker.run(tmp_path, *words, die_at=die_at) == -signal.SIGKILL
    files = list(run.glob("trunk-0-*.rows"))
    assert 0 < Run.open(run).metrics()[-1]["step"] < 16 and files
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(content[: len(content) * 3 // 4])
    code = forker.run(tmp_path, *TRAIN, f"adapter.trunk_cache={go_on}", "--resume")
    assert code == 0, (tmp_path / "output.log").read_text()
    assert outcome(run) == without["train.precision=fp32"]
    assert not list(run.glob("trunk-*"))


@pytest.mark.slow
def test_processes_share_the_file_of_their_machine(
    ranks: Ranks, base: Path, tmp_path: Path
) -> None:
    found = []
    for where in ("off", "memory", "disk"):
        folder = tmp_path / where
        prepare(folder, base)
        ended = ranks.run(folder, 2, *TRAIN, f"adapter.trunk_cache={where}")
        assert ended.codes == [0, 0], ended.texts
        log = facts(folder, 2, "lora")["log"]
        names = ("step", "loss", "grad_norm", "val_loss")
        found.append([[row.get(name) for name in names] for row in log])
    assert found[0] == found[1] == found[2]
