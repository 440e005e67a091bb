"""The form of the page Start: fields of the schema, problems at their fields, recipes that load."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mule import calibration, fsio, machine
from mule.commands import form, form_choices, form_recipe, stop
from mule.config.knobs import knobs
from mule.config.load import load_recipe
from mule.errors import ConfigError, UserError
from mule.run import Run
from tests.life.tiny_life import write_data
from tests.unit.test_plan import KNOWN

TINY = {
    "model.size": "1m",
    "tokenizer.vocab_size": "300",
    "data.train": ["text.txt"],
    "data.max_seq_length": "48",
    "train.steps": "7",
    "train.step_rows": "3",
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with tiny data; the machine was measured before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    write_data(folder)
    known = {
        calibration._key(): asdict(KNOWN),
        f"disk {tmp_path.stat().st_dev}": {"bytes_per_second": 2e8, "flush_s": 0.01},
    }
    machine.write_cached(calibration._FILE, known, "what was measured")
    monkeypatch.chdir(folder)
    return folder


def at(found: dict[str, Any], key: str) -> str:
    """What is said at a field."""
    return "\n".join(each["message"] for each in found["problems"] if each["key"] == key)


# ---------------------------------------------------------------- fields


def test_every_setting_is_one_field_and_the_usual_ones_come_first() -> None:
    found = form.fields()
    assert [row["key"] for row in found["first"]] == list(form.FIRST)
    keys = [row["key"] for section in found["sections"] for row in section["fields"]]
    assert sorted([*keys, *form.FIRST, "name", *form.NOT_IN_A_FORM]) == sorted(knobs())
    names = "model tokenizer data train optim adapter checkpoint evaluate goal export"
    assert [section["name"] for section in found["sections"]] == names.split()


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("optim.schedule", "choice", "cosine"),
        ("train.compile", "choice", "auto"),
        ("data.packing", "choice", "true"),
        ("optim.learning_rate", "number", "auto"),
        ("optim.eps", "number", "1e-08"),
        ("model.path", "text", ""),
        ("model.size", "text", ""),
        ("data.train", "lines", []),
        ("adapter.lora.target_modules", "lines", ["all-linear"]),
        ("data.columns", "map", []),
        ("export.types", "several", ["q8_0", "q4_k_m"]),
    ],
)
def test_how_a_setting_is_typed(key: str, kind: str, default: Any) -> None:
    found = form.fields()
    rows = [*found["first"], *(row for each in found["sections"] for row in each["fields"])]
    row = next(row for row in rows if row["key"] == key)
    assert (row["kind"], row["default"]) == (kind, default)
    assert row["help"] == knobs()[key].description and row["expected"]
    assert set(row["choices"]) >= ({"true", "false"} if key == "train.compile" else set())


# ---------------------------------------------------------------- from fields to a recipe


def test_only_what_was_typed_goes_into_the_recipe(work: Path) -> None:
    typed = {
        **TINY,
        "optim.schedule": "",
        "data.format": " text ",
        "optim.max_spike": "null",
        "optim.eps": "1e-7",
        "adapter.kind": "lora",
        "adapter.lora.target_modules": ["all-linear"],
        "model.sliding_layers": [],
        "export.types": ["f16"],
        "train.compile": "false",
        "evaluate.prompts": ["Who: you?", "  ", "# no comment"],
    }
    found = form_recipe.check(
        {**typed, "model.size": "", "tokenizer.vocab_size": "", "model.path": "base"}
    )
    assert found["ok"], found
    (work / "r.yaml").write_text(found["recipe"])
    loaded = load_recipe("r.yaml")
    recipe = loaded.recipe
    assert recipe.evaluate.prompts == ["Who: you?", "# no comment"]
    assert recipe.optim.max_spike is None and recipe.optim.eps == 1e-7
    assert recipe.adapter.lora.target_modules == "all-linear" and recipe.train.compile is False
    assert "optim.schedule" not in loaded.settings and "model.size" not in loaded.settings


def test_lists_and_maps_are_typed_a_line_each(work: Path) -> None:
    windows = {"model.sliding_window": "8", "model.sliding_layers": ["0", "2"]}
    columns = {"data.format": "alpaca", "data.columns": ["instruction: question"]}
    found = form_recipe.check({**TINY, **windows, **columns})
    assert "sliding_layers: [0, 2]" in found["recipe"], found
    assert "columns: {instruction: question}" in found["recipe"]
    found = form_recipe.check({**TINY, "data.columns": ["question"], "model.sliding_layers": ["a"]})
    assert at(found, "data.columns").startswith("question: write a name and a text a line")
    found = form_recipe.check({**TINY, **windows, "model.sliding_layers": ["a"]})
    assert at(found, "model.sliding_layers").startswith("item 1: expected")


def test_problems_are_those_of_the_loader_at_their_fields(work: Path) -> None:
    wrong = {
        "train.steps": "0",
        "optim.schedule": "cosin",
        "train.compile": "yes",
        "optim.beta1": "a: b",
        "train.seed": ["1"],
        "adapter.lora.s": "1",
        "extends": "x",
        "model.module": "own.py:GPT",
    }
    found = form_recipe.check({**TINY, **wrong})
    assert not found["ok"] and found["recipe"] == ""
    assert at(found, "train.steps") == "expected a whole number of at least 1, found 0"
    assert at(found, "optim.schedule").endswith("did you mean `cosine`?")
    assert at(found, "train.compile") == "expected auto, or true or false, found `yes`"
    assert at(found, "optim.beta1").startswith("expected a number of at least 0")
    assert at(found, "train.seed") == "a text is needed"
    assert "adapter.lora.s: no such key; did you mean `adapter.lora.r`?" in at(found, "")
    assert at(found, "extends").startswith("a form holds the settings themselves")
    assert at(found, "model.module").startswith("only a campaign trains a module of your own")
    found = form_recipe.check({**TINY, "train.epochs": "1"})
    assert at(found, "train.epochs") == (
        "train.steps says it already; keep one of steps, epochs, tokens"
    )
    found = form_recipe.check({**TINY, "adapter.lora.r": "4"})
    assert "cannot take effect while adapter.kind is none" in at(found, "adapter.lora.r")


def test_an_empty_form_says_what_is_missing(work: Path) -> None:
    found = form_recipe.check({})
    assert found["problems"] == [] and not found["ok"]
    assert {each["key"] for each in found["missing"]} == {"data.train", "model.path"}
    with pytest.raises(ConfigError, match=r"data\.train is missing"):
        form_recipe.plan({})
    with pytest.raises(ConfigError, match="model is missing"):
        form_recipe.save({"data.train": ["text.txt"]})


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("data.train", ["text.txt", "../secret.txt"]),
        ("data.valid", ["/etc/passwd"]),
        ("data.train", ["../*.txt"]),
        ("model.path", "../models/base"),
        ("tokenizer.path", "/tmp"),
        ("model.path", "link"),
    ],
)
def test_a_path_leads_out_of_the_folder_nowhere(work: Path, key: str, path: Any) -> None:
    (work / "link").symlink_to(work.parent)
    found = form_recipe.check({**TINY, key: path})
    assert "is outside of the folder of these pages; copy it here" in at(found, key)


def test_a_path_that_no_file_can_have(work: Path) -> None:
    for path in ("a\0b", "x" * 300):
        found = form_recipe.check({**TINY, "data.train": [path]})
        assert "this cannot be the name of a file" in at(found, "data.train")


# ---------------------------------------------------------------- begin, plan, save


def test_a_form_begins_with_a_recipe_of_the_folder_of_mule_or_a_run(work: Path) -> None:
    found = form.begin("own", "pretrain.yaml")
    assert found["values"]["train.steps"] == "30" and found["values"]["data.train"] == ["text.txt"]
    assert found["values"]["train.compile"] == "false" and found["name"] == "pretrain"
    again = form_recipe.check(found["values"])
    (work / "again.yaml").write_text(again["recipe"])
    assert load_recipe("again.yaml").recipe == load_recipe("pretrain.yaml").recipe
    found = form.begin("recipe", "qwen2.5-0.5b")
    assert found["values"]["model.path"] == "Qwen/Qwen2.5-0.5B-Instruct"
    typed = (work / "pretrain.yaml").read_text() + "\n# command line: train.steps=5\n"
    Run.create(Path("runs"), "pretrain", typed)
    found = form.begin("run", "pretrain")
    assert found["values"]["train.steps"] == "5" and found["name"] == "pretrain-2"


def test_a_run_whose_recipe_extended_another_begins_with_what_was_resolved(work: Path) -> None:
    run = Run.create(Path("runs"), "old", "extends: gone.yaml\n")
    with pytest.raises(ConfigError, match="neither"):
        form.begin("run", "old")
    run.write_resolved(
        "data:\n  train: [text.txt]\ntrain:\n  seed: 4\n  steps: 9  # one epoch\noptim:\n"
        "  kind: adamw\n"
    )
    values = form.begin("run", "old")["values"]
    assert values == {"data.train": ["text.txt"], "train.seed": "4"}


def test_the_plan_of_a_form_is_that_of_its_recipe(work: Path) -> None:
    found = form_recipe.plan({**TINY, "name": "first"})
    assert found["verdict"] == "fits" and found["counts"]["updates"] == 7
    assert found["next"] == "mule train recipes/first.yaml --name first"
    assert found["decided"].keys() == found["reasons"].keys()
    assert found["decided"]["train.device"] == "cpu"
    with pytest.raises(UserError, match=r"did you mean text\.txt"):
        form_recipe.plan({**TINY, "data.train": ["txt.txt"]})


def test_a_remedy_is_what_the_fields_would_hold(work: Path) -> None:
    shape = {"model.hidden_size": "8192", "model.num_layers": "40", "model.num_heads": "64"}
    large = {**TINY, "model.size": "", **shape, "train.micro_batch_rows": "3"}
    found = form_recipe.plan(large)
    assert found["verdict"] == "does not fit" and found["remedies"]
    for row in found["remedies"]:
        assert row["values"].keys() == {word.partition("=")[0] for word in row["set"].split()}
    eased = {**large, **found["remedies"][0]["values"]}
    assert form_recipe.check(eased)["ok"]


def test_nothing_is_fetched_while_one_types(work: Path) -> None:
    typed = {**TINY, "data.train": ["org/chats"]}
    with pytest.raises(UserError, match="org/chats is a data set of the hub") as refused:
        form_recipe.plan(typed)
    assert refused.value.hint == "fetch it, and look at it: mule data preview org/chats"
    tune = {"model.path": "org/model", "data.train": ["org/chats"]}
    found = form_recipe.check(tune, assume=True)
    assert "org/chats is a data set of the hub; fetch it" in at(found, "model.path")


def test_a_tune_says_what_it_assumes_and_why(work: Path) -> None:
    tune = {"model.path": "Qwen/Qwen2.5-0.5B-Instruct", "data.train": ["chats.jsonl"]}
    found = form_recipe.check(tune, assume=True)
    assert found["ok"] and found["name"] == "qwen2.5-0.5b-instruct-chats", found
    assert "  kind: lora  # assumed: the usual way on one machine" in found["recipe"]
    assert "last_layers: 8  # assumed: no GPU" in found["recipe"]
    whole = form_recipe.check({**tune, "adapter.kind": "none"}, assume=True)
    assert "kind: none\n" in whole["recipe"] and "lora" not in whole["recipe"]
    found = form_recipe.check({**tune, "model.path": "org/unknown"}, assume=True)
    assert "was not fetched yet" in at(found, "model.path")


def test_saving_writes_the_recipe_and_never_over_another(work: Path) -> None:
    saved = form_recipe.save({**TINY, "name": "first"})
    file = Path("recipes/first.yaml")
    assert saved["file"] == str(file) and saved["words"] == ["train", str(file)]
    assert file.read_text() == saved["recipe"] and load_recipe(file).recipe.train.steps == 7
    with pytest.raises(ConfigError, match=r"first\.yaml is already there, and is not overwritten"):
        form_recipe.save({**TINY, "name": "first"})
    changed = {**TINY, "name": "first", "train.steps": "8"}
    again = form_recipe.save(changed, seen=saved["sha256"])
    assert load_recipe(file).recipe.train.steps == 8 and again["sha256"] != saved["sha256"]
    assert form_recipe.check(TINY)["name"] == "run"
    Run.create(Path("runs"), "second", "name: second\n")
    found = form_recipe.check({**TINY, "name": "second"})
    assert "runs/second already exists" in at(found, "name") and "second-2" in at(found, "name")
    found = form_recipe.check({**TINY, "name": "a/b"})
    assert at(found, "name").startswith("expected letters, digits")
    with pytest.raises(UserError, match="`mule train` writes to runs"):
        form_recipe.save(TINY, runs=Path("elsewhere"))


# ---------------------------------------------------------------- what there is


def test_what_one_can_begin_with(work: Path) -> None:
    found = form_choices.here()
    assert found["recipes"] == ["pretrain.yaml"] and found["next"] == "mule train RECIPE"
    assert set(found["data"]) == {"text.txt", "chats.jsonl"} and found["models"] == []
    fsio.write_text("campaign.yaml", "variants:\n  a: {}\ndata: {train: [a]}\n")
    assert form_choices.here()["recipes"] == ["pretrain.yaml"]


def test_recipes_of_mule_are_told_without_measuring(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = form_choices.of_mule()
    assert found["measured"] and "TFLOP/s at most" in found["basis"]
    rows = found["catalogue"]
    assert all(row["fits"] in (True, False) and row["time"] for row in rows)
    machine.write_cached(calibration._FILE, {}, "what was measured")
    found = form_choices.of_mule()
    assert not found["measured"] and found["catalogue"] == []
    assert {"qwen2.5-0.5b", "pretrain-25m"} <= {row["name"] for row in found["recipes"]}


# ---------------------------------------------------------------- stopping a run


def test_a_run_is_stopped_only_where_it_trains(work: Path) -> None:
    run = Run.create(Path("runs"), "one", "name: one\n")
    with pytest.raises(UserError, match="runs/one is not running"):
        stop.run("one")
    with run.lock():
        (run.folder / "run.lock").write_text("1\n")  # a process that does not hold it
        with pytest.raises(UserError, match="is written by process 1") as refused:
            stop.run("one")
    assert refused.value.hint == "stop it where it runs: kill -INT 1"
