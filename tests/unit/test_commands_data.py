"""`mule init` and `mule runs plot`: what they write and say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mule.commands import init, plot
from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.data.sources import Conversation, read
from mule.errors import UserError
from mule.run import Run


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where `mule init shop` ran."""
    monkeypatch.chdir(tmp_path)
    init.run(Path("shop"))
    return tmp_path


# ---------------------------------------------------------------- init


def test_init_writes_a_recipe_that_loads_and_data_that_reads(shop: Path) -> None:
    of_the_demo = load_recipe(Path("shop/recipe.yaml")).recipe
    assert (of_the_demo.data.valid, of_the_demo.data.valid_share) == (None, 0)
    init.run(Path("cafe"), model="org/model")
    recipe = load_recipe(Path("cafe/recipe.yaml")).recipe
    assert (recipe.name, recipe.model.path) == ("cafe", "org/model")
    assert of_the_demo.adapter.kind == recipe.adapter.kind == "lora"
    train, valid = (list(read(paths or [])) for paths in (recipe.data.train, recipe.data.valid))
    assert (len(train), len(valid)) == (12, 4)
    assert all(isinstance(chat, Conversation) for chat in train + valid)
    questions = [chat.messages[0].content for chat in train + valid if hasattr(chat, "messages")]
    assert len(set(questions)) == 16


def test_the_schema_named_in_the_first_line_lies_beside_the_recipe(shop: Path) -> None:
    first = Path("shop/recipe.yaml").read_text().splitlines()[0]
    name = first.removeprefix("# yaml-language-server: $schema=")
    assert json.loads(Path("shop", name).read_text())["title"] == "Mule recipe"


def test_init_overwrites_nothing(shop: Path) -> None:
    Path("shop/recipe.yaml").unlink()
    Path("shop/data/train.jsonl").write_text("mine")
    with pytest.raises(UserError, match="already there, and is not overwritten") as caught:
        init.run(Path("shop"))
    assert caught.value.hint == "choose another folder: mule init shop/example"
    assert not Path("shop/recipe.yaml").exists()
    assert Path("shop/data/train.jsonl").read_text() == "mine"


def test_init_says_what_to_type_next(shop: Path) -> None:
    train = "mule train --model {} --data {} --export q4_k_m"
    found = init.run(Path("other"))["next"]
    assert found == train.format("Qwen/Qwen2.5-0.5B-Instruct", "other/data")
    assert init.run(Path("own"), model="my model")["next"] == train.format("'my model'", "own/data")
    recipe = load_recipe(Path("own/recipe.yaml")).recipe
    assert (recipe.model.path, recipe.train.epochs) == ("my model", None)
    Path("demo/runs/sft").mkdir(parents=True)
    Path("demo/runs/sft/latest.json").write_text("{}")
    assert init.run(Path("here"))["next"] == "mule data preview here/recipe.yaml"


def test_init_here_and_in_a_folder_with_an_odd_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "été: {my} shop"
    folder.mkdir()
    monkeypatch.chdir(folder)
    init.run(Path())
    recipe = load_recipe(Path("recipe.yaml")).recipe
    assert recipe.data.train == ["data/train.jsonl"]
    assert recipe.name is not None and Recipe(name=recipe.name)


# ---------------------------------------------------------------- results


def test_lists_inside_a_result_are_words_not_python() -> None:
    from mule.cli import render

    lineage = {
        "machine": {"cpu_flags": ["amx", "avx"], "notes": []},
        "sources": [{"file": "a.txt", "bytes": 1234}, {"file": "b.txt", "bytes": 5}],
    }
    assert list(render._flat(lineage)) == [
        ("machine.cpu_flags", "amx, avx"),
        ("machine.notes", None),
        ("sources.1.file", "a.txt"),
        ("sources.1.bytes", "1,234"),
        ("sources.2.file", "b.txt"),
        ("sources.2.bytes", "5"),
    ]


# ---------------------------------------------------------------- plot


@pytest.fixture
def a_run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "runs", "first", "")
    with run.lock():
        run.start_attempt(from_step=0)
        for step in range(1, 101):
            row = {"step": step, "loss": 5.0 / step, "num_targets": 10}
            run.log_metrics(row | ({"val_loss": 6.0 / step} if step % 25 == 0 else {}))
    return run


def test_a_curve_counts_tokens_or_steps(a_run: Run) -> None:
    tokens, steps = (plot.curve_of(a_run, by) for by in ("tokens", "steps"))
    assert (tokens["x"][0], tokens["x"][-1]) == (10, 1000)
    assert (steps["x"][0], steps["x"][-1]) == (1, 100)
    assert steps["valid"] == [(25, 0.24), (50, 0.12), (75, 0.08), (100, 0.06)]
    assert steps["smoothed"][-1] == pytest.approx((5 / 99 + 5 / 100) / 2)


def test_running_mean() -> None:
    assert plot.running_mean([1.0, 2.0, 6.0, 4.0], 2) == [1.0, 1.5, 4.0, 5.0]
    assert plot.running_mean([3.0], 9) == [3.0]


def test_plot_writes_a_picture(a_run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "docs" / "loss.svg"
    result = plot.run(["first"], out, root=a_run.folder.parent)
    assert result["curves"][0]["val_loss"] == 0.06
    first = out.read_text()
    assert first.startswith("<?xml") and "</svg>" in first
    plot.run(["first"], out, root=a_run.folder.parent)
    assert out.read_text() == first  # the same runs give the same file


@pytest.mark.parametrize(
    ("out", "by", "message", "hint"),
    [
        ("loss.bmp", "tokens", "cannot be written as .bmp", "--out loss.svg"),
        ("loss", "tokens", "a file without a suffix", "--out loss.svg"),
        ("loss.svg", "hours", "there is no axis `hours`", "one of tokens, steps"),
    ],
)
def test_plot_refuses_what_it_cannot_draw(out: str, by: str, message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plot.run(["first"], Path(out), by=by)
    assert hint in caught.value.hint


def test_plot_of_a_run_without_figures(tmp_path: Path) -> None:
    Run.create(tmp_path, "empty", "")
    with pytest.raises(UserError, match="has no figures to draw") as caught:
        plot.run(["empty"], tmp_path / "x.svg", root=tmp_path)
    assert "mule train" in caught.value.hint


def test_without_matplotlib_the_extra_is_named(
    a_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="drawing needs matplotlib") as caught:
        plot.run(["first"], tmp_path / "x.svg", root=a_run.folder.parent)
    assert "mule[report]" in caught.value.hint
