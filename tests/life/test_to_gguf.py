"""The road of a newcomer: init, train without a recipe through to a GGUF file, chat."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from mule.commands import init
from mule.config.load import load_recipe
from mule.run import Run
from tests.life.test_cli_life import call
from tests.life.tiny_life import REPOSITORY, Forker
from tests.tiny_folder import write_tiny_folder
from tests.unit.test_assume import QWEN

# Pages whose commands are run, and how many they have.
PAGES = {
    "docs/fine-tune-on-your-laptop.md": 6,
    "docs/from-donkeytune.md": 3,
    "docs/choose-a-model.md": 3,
}
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"  # a folder of this name stands for the model of the hub
FEW = "train.steps=3 train.threads=1 train.compile=false train.precision=fp32"


def page_commands(page: str) -> list[list[str]]:
    """The words after `mule` of every command in the page's blocks without a language."""
    found, fence = [], None
    for line in (REPOSITORY / page).read_text().splitlines():
        if line.startswith("```"):
            fence = line if fence is None else None
        elif fence == "```" and line.startswith("mule "):
            found.append(shlex.split(line, comments=True)[1:])
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    write_tiny_folder(folder / MODEL, QWEN)
    return folder


@pytest.fixture(scope="module")
def trained(forker: Forker, home: Path) -> dict[str, Any]:
    """What init and train gave."""
    code, begun = call(forker, home, "init --json")
    assert code == 0, begun
    assert begun["next"] == f"mule train --model {MODEL} --data data --export q4_k_m"
    line = f"{begun['next'].removeprefix('mule ')} {FEW} --json"
    code, found = call(forker, home, line)
    assert code == 0, found
    return found


def test_every_stage_is_walked(home: Path, trained: dict[str, Any]) -> None:
    names = "train merge export verify answer"
    assert [stage["stage"] for stage in trained["stages"]] == names.split()
    assert trained["run"] == "runs/qwen2.5-0.5b-instruct-data"
    (file,) = trained["files"]
    assert file == "exports/qwen2.5-0.5b-instruct-data/qwen2.5-0.5b-instruct-data-Q4_K_M.gguf"
    assert (home / file).is_file() and trained["next"] == f"mule chat {file}"
    assert len(trained["answers"]) == 3
    assert all(set(answer) == {"prompt", "base", "tuned"} for answer in trained["answers"])
    assert any("ollama create" in line for line in trained["ollama"])


def test_the_run_keeps_a_recipe_that_repeats_it(
    forker: Forker, home: Path, trained: dict[str, Any]
) -> None:
    file = home / trained["run"] / "recipe.yaml"
    assert "adapter:\n  kind: lora  # assumed: " in file.read_text()
    recipe = load_recipe(file).recipe
    assert (recipe.data.train, recipe.export.types) == (["data"], ["q4_k_m"])
    code, again = call(forker, home, f"train {trained['run']}/recipe.yaml --name again --json")
    assert code == 0, again
    first, second = (Run.open(home / run).metrics() for run in (trained["run"], "runs/again"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_the_same_command_again_needs_resume(
    forker: Forker, home: Path, trained: dict[str, Any]
) -> None:
    line = f"train --model {MODEL} --data data {FEW} --json"
    code, found = call(forker, home, line)
    assert code == 2 and "already exists" in found["error"] and "--resume" in found["hint"]
    code, found = call(forker, home, f"{line} --resume")
    assert (code, found["steps"]) == (0, 3)


def test_an_adapter_is_taken_on(forker: Forker, home: Path, trained: dict[str, Any]) -> None:
    line = (
        f"train --model {MODEL} --data data --warm-start {trained['run']} --name more {FEW} --json"
    )
    code, found = call(forker, home, line)
    assert code == 0, found
    recipe = load_recipe(home / "runs" / "more" / "recipe.yaml").recipe
    assert (recipe.adapter.kind, recipe.adapter.warm_start) == ("lora", trained["run"])
    first, second = (Run.open(home / run).metrics()[0] for run in (trained["run"], "runs/more"))
    assert first["loss"] != second["loss"], "it begins with what the other one learned"


@pytest.mark.slow
def test_all_weights_need_no_merge(forker: Forker, home: Path, trained: dict[str, Any]) -> None:
    line = f"train --model {MODEL} --data data --export q8_0 --name full adapter.kind=none {FEW}"
    code, found = call(forker, home, f"{line} --json")
    assert code == 0, found
    assert [stage["stage"] for stage in found["stages"]] == "train export verify answer".split()
    assert all("base" in answer for answer in found["answers"])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--export q4", "q4"),
        ("--export q4_k_m,q4_k_m", "q4_k_m is listed twice"),
    ],
)
def test_a_type_that_does_not_exist_is_refused_before_the_training(
    forker: Forker, home: Path, words: str, error: str
) -> None:
    code, found = call(forker, home, f"train --model {MODEL} --data data --name no {words} --json")
    assert code == 2 and error in found["error"]
    assert not (home / "runs" / "no").exists()


def test_a_model_that_llamacpp_cannot_run_is_refused_before_the_training(
    forker: Forker, home: Path
) -> None:
    folder = home / "scaled"
    write_tiny_folder(folder, QWEN)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "opt"}))
    line = "train --model scaled --data data --export q4_k_m --name no --json"
    code, found = call(forker, home, line)
    assert code == 2 and "opt" in found["error"]
    assert not (home / "runs" / "no").exists()


def test_a_stage_that_fails_leaves_what_is_done(
    forker: Forker, home: Path, trained: dict[str, Any]
) -> None:
    (home / "exports" / "blocked").mkdir(parents=True)
    (home / "exports" / "blocked" / "merged").mkdir()
    line = f"train --model {MODEL} --data data --export q8_0 --name blocked {FEW} --json"
    code, found = call(forker, home, line)
    assert code == 2, found
    assert "exists and is not a merged model of Mule's" in found["error"]
    assert "done by now: train (runs/blocked); go on with: mule merge runs/blocked" in found["hint"]
    assert Run.open(home / "runs" / "blocked").state() == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    PAGES,
)
def test_every_command_of_the_page_runs(forker: Forker, tmp_path: Path, page: str) -> None:
    commands = page_commands(page)
    assert len(commands) == PAGES[page]
    init.run(tmp_path / "example")
    (tmp_path / "example" / "data").rename(tmp_path / "data")
    for model in {
        MODEL,
        *(words[words.index("--model") + 1] for words in commands if "--model" in words),
    }:
        write_tiny_folder(tmp_path / model, QWEN)
    for words in commands:
        if words == ["init"]:
            shutil.rmtree(tmp_path / "data")
        few = FEW.split() if words[0] == "train" else []
        code = forker.run(tmp_path, *words, *few)
        assert code == 0, f"{words}\n{(tmp_path / 'output.log').read_text()}"
