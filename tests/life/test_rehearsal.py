"""The trial before the first update: it changes no bit, is made once, and ends a run that would die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mule import fsio
from mule.batch import Batch
from mule.commands import plan_check, train
from mule.errors import StorageError
from mule.models.decoder import Decoder
from mule.run import Run
from mule.train import rehearsal
from tests.life.tiny_life import CHAT_RECIPE, LORA, outcome, write_data


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("rehearsal")
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.run(Path("pretrain.yaml"), ["train.steps=6"], name="base")
        text = CHAT_RECIPE.replace("path: BASE", "path: runs/base") + LORA
        (folder / "lora.yaml").write_text(text)
        yield folder


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_SHARE_OF_FREE", 0.0)


def events(name: str) -> list[str]:
    return [event["kind"] for event in Run.open(Path("runs") / name).events()]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("pretrain.yaml", ("train.dropout=0.2",)),
        pytest.param(
            "pretrain.yaml",
            ("model.family=qwen3_moe", "model.moe.balance=bias"),
            marks=pytest.mark.slow,
        ),
        ("lora.yaml", ("train.seed=9",)),
    ],
)
def test_a_run_is_the_same_to_the_bit(
    recipe: str, words: tuple[str, ...], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["train.steps=6", *words]
    names = [f"{Path(recipe).stem}-{len(words[0])}-{kind}" for kind in ("without", "with")]
    train.run(Path(recipe), given, name=names[0])
    assert rehearsal.LEFT_OUT in events(names[0]) and rehearsal.REHEARSED not in events(names[0])
    monkeypatch.setattr(rehearsal, "_SHARE_OF_FREE", 0.0)
    train.run(Path(recipe), given, name=names[1])
    assert rehearsal.REHEARSED in events(names[1])
    without, with_it = (outcome(Path("runs") / name) for name in names)
    assert without == with_it


def test_it_is_tried_once_in_a_run(home: Path, always: None) -> None:
    train.run(Path("pretrain.yaml"), ["train.steps=2"], name="once")
    folder = Path("runs/once")
    train.run(folder / "recipe.yaml", [], resume=True, root=Path("runs"))
    assert events("once").count(rehearsal.REHEARSED) == 1


def test_less_is_computed_at_once_where_memory_runs_out(
    home: Path, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nll_sum, sizes = Decoder.nll_sum, []

    def greedy(self: Decoder, batch: Batch, grad_scale: float = 1.0) -> torch.Tensor:
        sizes.append(len(batch.targets))
        if len(batch.targets) > 2:
            torch.empty(1 << 62, dtype=torch.uint8)
        return nll_sum(self, batch, grad_scale)

    monkeypatch.setattr(Decoder, "nll_sum", greedy)
    train.run(Path("pretrain.yaml"), ["train.steps=2"], name="halved")
    assert sizes[:2] == [3, 2] and "micro-batch halved" in events("halved")
    assert max(sizes[1:]) == 2  # no update was begun with more


def test_a_disk_that_is_too_small_ends_it_before_the_first_update(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, num_bytes: int, what: str) -> None:
        if "that the run will hold" in what:
            raise StorageError(f"{what} needs {num_bytes} bytes", "free some space")

    monkeypatch.setattr(fsio, "require_space", refuse)
    with pytest.raises(StorageError, match="4 checkpoints that the run will hold needs"):
        train.run(Path("pretrain.yaml"), [], name="full")


def test_the_fullest_rows_are_tried(home: Path) -> None:
    from mule.config.load import load_recipe
    from mule.data.recipe_rows import prepared_rows
    from mule.tokenizer import Tokenizer

    recipe = load_recipe(Path("lora.yaml")).recipe
    tokenizer = Tokenizer.load("runs/base/tokenizer")
    shards, _ = prepared_rows(recipe.data, 3, tokenizer, Path("runs"))
    rows = rehearsal.fullest_rows(shards, 3)
    counts = rehearsal._targets(shards.parts[0])
    assert rows[0] == 0 and len(set(rows.tolist())) == 3
    assert counts[rows[1]] >= counts[rows[2]] >= sorted(counts)[-4]


def test_a_check_without_a_run(home: Path) -> None:
    """The folder goes, what was prepared stays."""
    before = sorted(path.name for path in Path("runs").iterdir())
    found = plan_check.run(Path("pretrain.yaml"), [], {"verdict": "fits"})
    assert found["rehearsed"].startswith("tried the 3 fullest rows, an evaluation and the space")
    assert found["rehearsed_bytes"] > 0
    assert sorted(path.name for path in Path("runs").iterdir()) == before
