"""The catalogue of models: its figures, its list, and that the file is what the shapes give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mule import calibration, fsio, machine
from mule.commands import catalogue, recipes
from mule.config.load import load_recipe
from mule.config.presets import CATALOGUE, MODELS, catalogue_file, presets
from mule.errors import UserError
from mule.plan.catalogue import entries, train_seconds
from tests.conftest import Mule

# As the makers state them, in billions.
PUBLISHED = {
    "gemma-3-270m": 0.268,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-coder-1.5b": 1.54,
    "smollm3-3b": 3.08,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "llama-3.1-8b-qlora": 8.03,
    "llama-3.1-8b-qlora-4gpu": 8.03,
}
FIGURES = ("parameters", "download_bytes", "q4_k_m_bytes", "flops")


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    file = catalogue_file(CATALOGUE)
    assert file is not None
    return fsio.read_json(file)


@pytest.fixture
def a_slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One core of 0.1 TFLOP/s without bf16, whatever runs the test."""
    monkeypatch.setattr(calibration, "is_known", lambda: False)
    monkeypatch.setattr(machine, "matmul_peak", lambda *_: 1e11)
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)


def test_the_file_is_what_the_shapes_give(known: dict[str, Any]) -> None:
    assert known == catalogue.computed(), "run: make docs"


def test_every_model_has_its_published_size(known: dict[str, Any]) -> None:
    assert set(known) == set(PUBLISHED)
    for name, billions in PUBLISHED.items():
        assert known[name]["parameters"]["value"] / 1e9 == pytest.approx(billions, rel=5e-3), name
        assert known[name]["download_bytes"]["value"] == 2 * known[name]["parameters"]["value"]


def test_every_figure_says_how_it_is_known(known: dict[str, Any]) -> None:
    for row in known.values():
        told = [row[key]["basis"] for key in FIGURES]
        told += [figure["basis"] for figure in row["memory_bytes"].values()]
        assert set(told) == {"computed"}, "nothing is measured yet"


def test_a_recipe_names_the_model_of_its_figures(known: dict[str, Any]) -> None:
    models = catalogue_file(MODELS)
    assert models is not None
    for entry in entries(models):
        recipe = load_recipe(presets()[entry.name]).recipe
        assert recipe.model.path == entry.model == known[entry.name]["model"]
        assert recipe.name == entry.name, "a stem would lose what follows the last dot"
        assert recipe.data.max_seq_length <= entry.config.max_position_embeddings
        assert recipe.adapter.lora.last_layers < entry.config.num_layers


def test_four_bits_take_less_memory_than_the_download_has_bytes(known: dict[str, Any]) -> None:
    taken = known["llama-3.1-8b-qlora"]["memory_bytes"]["bf16"]["value"]
    assert taken < 0.7 * known["llama-3.1-8b-qlora"]["download_bytes"]["value"]


def test_time_is_work_by_speed() -> None:
    assert train_seconds(1e15, 1e12) == pytest.approx(4000)
    assert train_seconds(1e15, 1e12, 4) == pytest.approx(1000)


# ---------------------------------------------------------------- the list


def names(result: dict[str, Any]) -> list[str]:
    return [row["name"] for row in result["catalogue"]]


def test_all_are_listed_by_memory(a_slow_cpu: None) -> None:
    listed = recipes.list_recipes()
    assert set(names(listed)) == set(PUBLISHED)
    taken = [row["memory_bytes"] for row in listed["catalogue"]]
    assert taken == sorted(taken)
    assert "donkeytune" in {row["name"] for row in listed["recipes"]}
    assert not set(names(listed)) & {row["name"] for row in listed["recipes"]}
    assert "400 chats seen 3 times" in listed["basis"] and "in fp32" in listed["basis"]


@pytest.mark.parametrize(
    ("memory", "fitting", "too_large"),
    [("8GB", "qwen2.5-0.5b", "qwen2.5-1.5b"), ("16", "qwen2.5-1.5b", "llama-3.2-3b")],
)
def test_only_what_fits(a_slow_cpu: None, memory: str, fitting: str, too_large: str) -> None:
    found = names(recipes.list_recipes(memory=memory))
    assert fitting in found and too_large not in found


def test_half_the_width_lets_more_fit(a_slow_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(recipes.list_recipes(memory="16GB"))
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: True)
    after = names(recipes.list_recipes(memory="16GB"))
    assert set(before) < set(after) and "llama-3.2-3b" in after


def test_by_task(a_slow_cpu: None) -> None:
    found = recipes.list_recipes(task="code")
    assert names(found) == ["qwen2.5-coder-1.5b"]
    assert (found["recipes"], found["next"]) == ([], "mule recipe show qwen2.5-coder-1.5b")


@pytest.mark.parametrize(
    ("asked", "error", "hint"),
    [
        ({"memory": "much"}, "--memory much: not a size", "--memory 16GB"),
        ({"task": "poetry"}, "--task poetry: not a task", "chat, code"),
        (
            {"memory": "1GB", "task": "code"},
            "nothing in the catalogue is for this: --memory 1GB, --task code",
            "mule recipe list",
        ),
    ],
)
def test_what_cannot_be_listed(
    a_slow_cpu: None, asked: dict[str, str], error: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        recipes.list_recipes(**asked)
    assert caught.value.message == error
    assert hint in caught.value.hint


def test_the_terminal_shows_a_table(
    a_slow_cpu: None, mule_cli: Mule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: 2)
    code, out, _ = mule_cli("recipe", "list", "--memory", "8GB")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("qwen2.5-0.5b ")]
    for told in ("Qwen/Qwen2.5-0.5B-Instruct", "494M", "chat", "942 MiB", "GiB", " h"):
        assert told in line, told
    assert "on these 2 cores (0.1 TFLOP/s at most)" in out
    code, out, _ = mule_cli("recipe", "list", "--json")
    assert len(json.loads(out.splitlines()[-1])["catalogue"]) == len(PUBLISHED)


def test_times_in_words() -> None:
    found = [recipes.in_words(s) for s in (10, 600, 5399, 5400, 36_000, 172_799, 200_000)]
    assert found == ["a minute", "10 min", "90 min", "1.5 h", "10 h", "48 h", "2 days"]


def test_the_shapes_are_packaged_with_the_recipes() -> None:
    assert {catalogue_file(name) for name in (MODELS, CATALOGUE)} == {
        Path(presets()["qwen2.5-0.5b"]).with_name(name) for name in (MODELS, CATALOGUE)
    }
