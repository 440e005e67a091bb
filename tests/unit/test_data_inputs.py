"""The words after a data verb, and the tokenizer that data is read with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mule.commands.data_inputs import (
    data_paths,
    load_tokenizer,
    open_inputs,
    recipe_of,
    sort_words,
)
from mule.errors import ConfigError, DataError, ModelError, UserError
from mule.tokenizer import Tokenizer

TEXT = "The mule carries water up the hill, and the hill does not thank it. "


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 9], 300)


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


# ---------------------------------------------------------------- words


def test_words_are_told_apart_in_any_order() -> None:
    Path("odd=name.jsonl").touch()
    given = sort_words(["data.threads=all", "a.jsonl", "odd=name.jsonl", "owner/set", "b/*.txt"])
    assert given.recipe_file is None
    assert given.paths == ["a.jsonl", "odd=name.jsonl", "owner/set", "b/*.txt"]
    assert given.overrides == ["data.threads=all"]
    given = sort_words(["train.steps=5", "mine.yml"])
    assert (given.recipe_file, given.overrides) == (Path("mine.yml"), ["train.steps=5"])


def test_a_recipe_that_comes_with_mule_is_named_without_its_ending() -> None:
    from mule.config.presets import presets

    name = next(iter(presets()))
    assert sort_words([name]).recipe_file == Path(name)
    Path(name).mkdir(parents=True)
    assert sort_words([name]).paths == [name]  # what lies here goes first


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ([], "no data is given", "name files or folders, or a recipe: mule data --help"),
        (["data.format=text"], "no data is given", "name files or folders"),
        (["a.yaml", "b.yml"], "a.yaml and b.yml: two recipes", "one recipe at a time"),
        (
            ["a.yaml", "x.jsonl"],
            "a.yaml is a recipe and x.jsonl is data: a recipe names its own data",
            "leave out one of them, or replace its data: data.train=x.jsonl",
        ),
        (["x.jsonl", "data.train=y.jsonl"], "data.train is given beside x.jsonl", "leave out one"),
    ],
)
def test_words_that_contradict_each_other(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_of(sort_words(words))
    assert caught.value.message == message
    assert hint in caught.value.hint


def test_a_misspelt_setting_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of(sort_words(["x.jsonl", "data.fromat=text"]))
    assert "data.fromat" in caught.value.message
    assert "data.format" in caught.value.message


def test_paths_become_the_data_of_a_recipe_of_defaults() -> None:
    recipe = recipe_of(sort_words(["x.jsonl", "y", "data.max_seq_length=64", "train.seed=3"]))
    assert recipe.data.train == ["x.jsonl", "y"]
    assert (recipe.data.max_seq_length, recipe.train.seed) == (64, 3)
    assert recipe_of(sort_words(["data.train=x.jsonl"])).data.train == ["x.jsonl"]


def test_verbs_for_data_take_no_recipe() -> None:
    paths, options = data_paths(["x.json", "data.format=alpaca", "data.columns.output=answer"])
    assert paths == ["x.json"]
    assert (options.format, options.columns) == ("alpaca", (("output", "answer"),))
    with pytest.raises(UserError, match=r"r\.yaml is a recipe; this verb takes data") as caught:
        data_paths(["r.yaml"])
    assert "name files or folders" in caught.value.hint


# ---------------------------------------------------------------- the data


def test_the_validation_files_of_a_folder_are_found() -> None:
    Path("d").mkdir()
    Path("d/train.jsonl").write_text(chat("a", "b"))
    Path("d/valid.jsonl").write_text(chat("c", "d"))
    inputs = open_inputs(["d"])
    assert inputs.paths == [Path("d/train.jsonl")]
    assert inputs.valid == [Path("d/valid.jsonl")]
    inputs = open_inputs(["d/train.jsonl", "data.valid=d/valid.jsonl"])
    assert inputs.valid == [Path("d/valid.jsonl")]


def test_a_missing_file_is_named() -> None:
    Path("chats.jsonl").write_text(chat("a", "b"))
    with pytest.raises(DataError, match=r"chat\.jsonl: no such file or folder") as caught:
        open_inputs(["chat.jsonl"])
    assert caught.value.hint == "did you mean chats.jsonl?"


# ---------------------------------------------------------------- the tokenizer


def test_a_throw_away_tokenizer_is_the_same_every_time_and_says_what_it_is() -> None:
    Path("x.jsonl").write_text("".join(chat(f"What is {n}?", TEXT * 3) for n in range(40)))
    first, second = open_inputs(["x.jsonl"]), open_inputs(["x.jsonl"])
    assert first.tokenizer.fingerprint() == second.tokenizer.fingerprint()
    assert first.tokenizer.chat_template is not None
    size = first.tokenizer.vocab_size
    assert 260 < size <= 8192
    assert first.tokenizer_origin == (
        f"a throw-away tokenizer of {size:,} tokens in ChatML, trained on the beginning of this "
        "data, so counts are estimates; for real ones add --tokenizer MODEL_FOLDER"
    )


def test_the_throw_away_tokenizer_learns_from_every_file_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mule.commands.data_inputs._SAMPLE_CHARS", 4000)
    Path("a.txt").write_text("alpha " * 10_000)
    Path("b.txt").write_text("omega " * 10_000)
    tokenizer = open_inputs(["a.txt", "b.txt"]).tokenizer
    assert len(tokenizer.encode(" alpha")) == len(tokenizer.encode(" omega")) == 1


def test_rows_that_cannot_be_read_are_passed_over() -> None:
    Path("x.jsonl").write_text(chat("a", TEXT) + "{broken\n" + chat("c", "zebra zebra zebra"))
    tokenizer = open_inputs(["x.jsonl"]).tokenizer
    assert len(tokenizer.encode(" zebra")) == 1


def test_preference_files_can_be_tokenized_too() -> None:
    row = {"prompt": "Which?", "chosen": TEXT, "rejected": "zebra zebra zebra"}
    Path("p.jsonl").write_text(json.dumps(row) + "\n")
    assert len(open_inputs(["p.jsonl"]).tokenizer.encode(" zebra")) == 1


def test_data_without_a_recipe_is_read_without_torch() -> None:
    Path("x.jsonl").write_text(chat("a", TEXT))
    code = (
        "import sys\nfrom mule.commands.data_inputs import open_inputs\n"
        "open_inputs(['x.jsonl'])\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tokenizer_is_named_by_run_folder_or_file(tokenizer: Tokenizer) -> None:
    tokenizer.save("runs/mine/tokenizer")
    Path("runs/mine/recipe.yaml").touch()
    tokenizer.save("folder")
    names = ("mine", "runs/mine", "folder", "folder/tokenizer.json")
    prints = {load_tokenizer(name).fingerprint() for name in names[:3]}
    assert prints == {tokenizer.fingerprint()}
    assert load_tokenizer(names[3]).encode(TEXT) == tokenizer.encode(TEXT)
    Path("x.jsonl").write_text(chat("a", "b"))
    inputs = open_inputs(["x.jsonl"], "mine")
    assert inputs.tokenizer_origin == "the tokenizer of mine"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("none", "none: no tokenizer.json, run or model folder of this name", "runs here: mine"),
        ("m.gguf", "m.gguf: the tokenizer of a GGUF file is not read here", "name the run"),
        ("empty", "empty: no tokenizer.json in this folder", "AutoTokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_refused(name: str, message: str, hint: str) -> None:
    Path("empty").mkdir()
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/recipe.yaml").touch()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(name)
    assert caught.value.message == message
    assert hint in caught.value.hint


def test_the_origin_names_where_a_recipe_has_its_tokenizer_from(tokenizer: Tokenizer) -> None:
    tokenizer.save("folder")
    Path("x.txt").write_text(TEXT * 30)
    named = open_inputs(["x.txt", "tokenizer.path=folder"])
    assert named.tokenizer_origin == "tokenizer.path = folder"
    trained = open_inputs(["x.txt", "tokenizer.vocab_size=280"])
    assert trained.tokenizer_origin == "trained on data.train, tokenizer.vocab_size = 280"
    assert trained.tokenizer.vocab_size == 280
    Path("r.yaml").write_text(
        "model: {size: 1m}\ntokenizer: {path: folder}\ndata: {train: [x.txt]}\n"
    )
    assert open_inputs(["r.yaml"]).tokenizer.fingerprint() == tokenizer.fingerprint()
    assert open_inputs(["r.yaml"], "folder").tokenizer_origin == "the tokenizer of folder"


def test_a_recipe_without_a_tokenizer_is_refused_as_training_does() -> None:
    Path("x.txt").write_text(TEXT)
    Path("r.yaml").write_text("model: {size: 1m}\ndata: {train: [x.txt]}\n")
    with pytest.raises(ConfigError, match="a new model needs a tokenizer"):
        open_inputs(["r.yaml"])


def test_a_word_of_a_megabyte_does_not_stop_a_throw_away_tokenizer(tmp_path: Path) -> None:
    """Training on a word takes time by the square of its length, so such words are cut."""
    file = tmp_path / "long.jsonl"
    text = "A" * 500_000 + " " * 500_000
    file.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "the way"}) + "\n")
    inputs = open_inputs([str(file)])
    assert inputs.tokenizer_origin.startswith("a throw-away tokenizer")
    assert inputs.tokenizer.decode(inputs.tokenizer.encode("the way AAA")) == "the way AAA"
