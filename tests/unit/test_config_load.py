"""The strict loader: every problem at once, with its place and the near name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mule.config.load import Loaded, load_recipe
from mule.errors import ConfigError

MINIMAL = "model: {size: 1m}\ndata: {train: [corpus.txt]}\n"


def load(folder: Path, text: str, *overrides: str) -> Loaded:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, list(overrides))


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """The problems of a recipe, the folder's name cut off."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


def one_problem(folder: Path, text: str, *overrides: str) -> str:
    found = problems(folder, text, *overrides)
    assert len(found) == 1, found
    return found[0]


def test_a_minimal_recipe_has_the_defaults(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL)
    assert loaded.recipe.optim.learning_rate == "auto"
    assert loaded.recipe.train.compile == "auto"
    assert loaded.recipe.export.types == ["q8_0", "q4_k_m"]
    assert loaded.set_keys == {"model.size", "data.train"}
    assert loaded.text == MINIMAL
    assert loaded.file == tmp_path / "recipe.yaml"


def test_every_problem_is_reported_at_once_in_order(tmp_path: Path) -> None:
    text = """\
lr: 3
model:
  path: some/model
  size: 25m
train:
  stpes: 5
  seed: 1
  seed: 2
  steps: 0
  step_rows: 1e3
  compile: yes
  precision: bf61
data:
  train: corpus.txt
  valid: [a.txt, 5]
optim:
  learning_rate:
  decay_share: 0.3
evaluate: 5
foo: {a: b}
"""
    assert problems(tmp_path, text, "train.sed=1", "train.tokens=abc", "x", "model=1") == [
        "recipe.yaml:1: lr: no such key; Mule calls it `optim.learning_rate`",
        "recipe.yaml:4: model.size: cannot take effect: model.path=some/model brings its own; "
        "remove one of the two",
        "recipe.yaml:6: train.stpes: no such key; did you mean `train.steps`?",
        "recipe.yaml:8: train.seed: given twice (first on line 7); remove one",
        "recipe.yaml:9: train.steps: expected a whole number of at least 1, found 0",
        "recipe.yaml:10: train.step_rows: expected a whole number of at least 1, found 1000; "
        "write 1_000",
        "recipe.yaml:11: train.compile: expected auto, or true or false, found `yes`",
        "recipe.yaml:12: train.precision: expected auto, bf16, fp32, fp16 or fp8, found `bf61`; "
        "did you mean `bf16`?",
        "recipe.yaml:14: data.train: expected a list of texts, found `corpus.txt`; "
        "write [corpus.txt]",
        "recipe.yaml:15: data.valid: item 2: expected text, found 5; put it in quotes",
        "recipe.yaml:17: optim.learning_rate: expected a number above 0 and at most 1, or auto, "
        "found nothing",
        "recipe.yaml:19: `evaluate` holds keys, such as `every_steps: ...`",
        "recipe.yaml:20: foo: no such key; a recipe has name, extends, model, tokenizer, data, "
        "train, optim, adapter, checkpoint, evaluate, goal, export",
        "command line: train.sed=1: no such key; did you mean `train.seed`?",
        "command line: x: not of the form section.key=value",
        "command line: model=1: a section; set its keys one by one",
        "command line: train.tokens=abc: expected a whole number of at least 1, found `abc`",
    ]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("train.lr", "Mule calls it `optim.learning_rate`"),
        ("num_train_epochs", "Mule calls it `train.epochs`"),
        ("per_device_train_batch_size", "state the whole batch of an update once"),
        ("gradient_accumulation_steps", "`train.step_rows` or `train.step_tokens`"),
        ("max_length", "Mule calls it `data.max_seq_length`"),
        ("lora_r", "Mule calls it `adapter.lora.r`"),
        ("adapter.lora-alpha", "Mule calls it `adapter.lora.alpha`"),
        ("iters", "Mule calls it `train.steps`"),
        ("learning_rate", "did you mean `optim.learning_rate`?"),
        ("train.max_seq_length", "did you mean `data.max_seq_length`?"),
        ("adapter.lora.alfa", "did you mean `adapter.lora.alpha`?"),
        ("adaptor.kind", "did you mean `adapter.kind`?"),
    ],
)
def test_an_unknown_key_names_ours(tmp_path: Path, key: str, says: str) -> None:
    found = one_problem(tmp_path, MINIMAL, f"{key}=1")
    assert found.startswith(f"command line: {key}=1: no such key; ")
    assert says in found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", ": it is empty; `mule init` writes an example"),
        ("# only a comment\n", ": it is empty; `mule init` writes an example"),
        ("train:\n\tsteps: 5\n", ":2: a tab; YAML is indented with spaces"),
        ("train: {steps: !!python/object:os.system 5}", ":1: the tag !!python/object:os.system"),
        ("a: !x 5", ":1: the tag !x is refused; write plain values"),
        ("train: {steps: 5}\n---\ntrain: {}", ":2: a second document (---)"),
        ("%YAML 1.1\n---\ntrain: {compile: no}", ":2: only YAML 1.2 is read"),
        ("- steps", ":1: a recipe holds keys"),
        ("train: {steps: 5", ":1: not valid YAML"),
        ("name: a: b", ":1: a colon where none can be"),
        ("? [a]\n: 5", ":1: a list or mapping as a key"),
        ("name: \x00", ":1: not valid YAML: unacceptable character"),
        ("data: {train: &a [*a]}", ":1: its aliases expand without end"),
        ("data: {train: " + "[" * 40 + "]" * 40 + "}", ":1: nested too deeply"),
    ],
)
def test_what_is_not_a_recipe_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    assert one_problem(tmp_path, text).startswith(f"recipe.yaml{problem}")


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    bomb = "x0: &x0 [a, a, a, a, a, a, a, a, a]\n"
    for level in range(1, 9):
        bomb += f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * 9)}]\n"
    found = problems(tmp_path, bomb + "data: {train: *x8}")
    assert any("its aliases expand without end" in problem for problem in found)


def test_yaml_1_2_reads_numbers_and_words_as_written(tmp_path: Path) -> None:
    text = """\
name: no
model: {size: 1m}
data: {train: ["5", yes.txt], max_seq_length: 0x10}
train: {tokens: 1_000_000, compile: false}
optim: {learning_rate: 1e-4}
adapter:  # nothing below it
"""
    recipe = load(tmp_path, text).recipe
    assert recipe.name == "no"
    assert recipe.data.train == ["5", "yes.txt"]
    assert recipe.data.max_seq_length == 16
    assert recipe.train.tokens == 1_000_000
    assert recipe.train.compile is False
    assert recipe.optim.learning_rate == 1e-4


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(file).recipe.model.size == "1m"


def test_latin_1_text_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"model: {size: 1m}\nname: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml:2: not UTF-8 text"):
        load_recipe(file)


# ---------------------------------------------------------------- overrides


def test_overrides_go_before_the_file_and_are_kept_in_the_text(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        MINIMAL,
        "data.train=[a.txt,b.txt]",
        "optim.learning_rate=1e-3",
        "evaluate.prompts='a: b'",
        "export.types=f16",
    )
    assert loaded.recipe.data.train == ["a.txt", "b.txt"]
    assert loaded.recipe.optim.learning_rate == 1e-3
    assert loaded.recipe.evaluate.prompts == ["a: b"]
    assert loaded.recipe.export.types == ["f16"]
    assert loaded.text.startswith(MINIMAL)
    assert "\n# command line: optim.learning_rate=1e-3\n" in loaded.text
    assert loaded.place("export.types") == "command line: export.types=f16"
    assert loaded.place("model.size").endswith("recipe.yaml:1: model.size")
    assert loaded.place("train.seed") == "train.seed"


def test_a_key_twice_on_the_command_line_is_refused(tmp_path: Path) -> None:
    found = one_problem(tmp_path, MINIMAL, "train.seed=1", "train.seed=2")
    assert found == "command line: train.seed=2: train.seed is given twice"


def test_a_later_source_replaces_what_it_makes_idle(tmp_path: Path) -> None:
    text = MINIMAL + "train: {epochs: 3}\noptim: {schedule: wsd, decay_share: 0.1}\n"
    recipe = load(tmp_path, text, "train.steps=20", "optim.schedule=cosine").recipe
    assert (recipe.train.steps, recipe.train.epochs) == (20, None)
    assert "decay_share" not in recipe.optim.model_fields_set


def test_a_later_setting_that_an_earlier_one_makes_idle_is_an_error(tmp_path: Path) -> None:
    text = "model: {path: some/run}\ndata: {train: [a]}\n"
    found = one_problem(tmp_path, text, "model.hidden_size=64")
    assert found.startswith("command line: model.hidden_size=64: cannot take effect: model.path=")


def test_null_takes_a_setting_away(tmp_path: Path) -> None:
    text = MINIMAL + "train: {epochs: 3}\n"
    for word in ("train.epochs=null", "train.epochs="):
        loaded = load(tmp_path, text, word)
        assert loaded.recipe.train.epochs is None
        assert "train.epochs" not in loaded.set_keys


def test_without_a_file_the_command_line_is_the_recipe() -> None:
    loaded = load_recipe(None, ["data.train=a.txt", "model.size=1m"])
    assert loaded.file is None
    assert loaded.text == "\n# command line: data.train=a.txt\n# command line: model.size=1m\n"


# ---------------------------------------------------------------- cross-field checks


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        (["train.steps=5", "train.epochs=2"], "train.epochs", "train.steps says it already"),
        (["train.step_rows=5", "train.step_tokens=64"], "train.step_tokens", "says it already"),
        (["optim.decay_share=0.1"], "optim.decay_share", "optim.schedule=cosine"),
        (
            ["optim.schedule=constant", "optim.min_learning_rate=1e-5"],
            "optim.min_learning_rate",
            "optim.schedule=constant",
        ),
        (
            ["optim.learning_rate=0.01", "optim.min_learning_rate=0.1"],
            "optim.min_learning_rate",
            "is above optim.learning",
        ),
        (["adapter.lora.r=4"], "adapter.lora.r", "while adapter.kind is none"),
        (["data.format=gsm8k", "data.document_mask=true"], "data.document_mask", "kept apart"),
        (["data.valid=[b]", "data.valid_share=0.1"], "data.valid_share", "data.valid is given"),
        (
            ["tokenizer.path=t", "tokenizer.vocab_size=512"],
            "tokenizer.vocab_size",
            "tokenizer.path=t is used as it is",
        ),
        (["model.num_heads=6", "model.num_kv_heads=4"], "model.num_kv_heads", "does not divide"),
        (["model.head_dim=7"], "model.head_dim", "odd"),
        (["model.hidden_size=50", "model.num_heads=3"], "model.num_heads", "not an even whole"),
        (["model.vocab_size=300", "tokenizer.vocab_size=400"], "model.vocab_size", "less than"),
        (
            ["model.max_position_embeddings=64", "data.max_seq_length=128"],
            "model.max_position_embeddings",
            "rows would not fit",
        ),
        (["export.types=[f16,q8_0,f16]"], "export.types", "f16 is listed twice"),
        (["optim.learning_rate=.nan"], "optim.learning_rate", "expected a number above 0"),
        (["optim.learning_rate=.inf"], "optim.learning_rate", "expected a number above 0"),
        (["model.size=25M"], "model.size", "a number followed by m or b, such as 25m"),
        (["name=../x"], "name", "letters, digits, dot, dash and underscore"),
        (["train.seed=true"], "train.seed", "found true"),
        (["data.train=[]"], "data.train", "is missing: the files to train on"),
    ],
)
def test_settings_that_cannot_work_together(
    tmp_path: Path, overrides: list[str], key: str, says: str
) -> None:
    found = one_problem(tmp_path, MINIMAL, *overrides)
    assert key in found
    assert says in found


def test_a_model_and_data_are_required(tmp_path: Path) -> None:
    assert problems(tmp_path, "train: {steps: 5}\n") == [
        "recipe.yaml: data.train is missing: the files to train on, as data.train: [corpus.txt]",
        "recipe.yaml: model is missing: give model.path (to start from it) or model.size, "
        "such as 25m",
    ]
    partial = "data: {train: [a]}\nmodel: {hidden_size: 64}\n"
    assert "model.num_layers, model.num_heads missing" in one_problem(tmp_path, partial)


# ---------------------------------------------------------------- files


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "pizza.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"piza\.yaml: no such file") as caught:
        load_recipe(tmp_path / "piza.yaml")
    assert caught.value.hint == f"did you mean `{tmp_path}/pizza.yaml`?"
    assert caught.value.exit_code == 2


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder, not a recipe"):
        load_recipe(tmp_path)


def test_extends_merges_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(MINIMAL + "optim: {beta1: 0.8, beta2: 0.99}\n")
    (tmp_path / "sub" / "mid.yaml").write_text("extends: ../base.yaml\noptim: {beta1: 0.7}\n")
    loaded = load(tmp_path, "extends: sub/mid.yaml\ntrain: {steps: 3}\n")
    assert (loaded.recipe.optim.beta1, loaded.recipe.optim.beta2) == (0.7, 0.99)
    assert loaded.recipe.extends is None
    assert loaded.place("optim.beta1").endswith("mid.yaml:2: optim.beta1")
    assert loaded.text == "extends: sub/mid.yaml\ntrain: {steps: 3}\n"


def test_a_problem_in_a_parent_names_the_parent(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {size: 1m}\ndata: {train: [a], sed: 1}\n")
    found = one_problem(tmp_path, "extends: base.yaml\n")
    assert found.startswith("base.yaml:2: data.sed: no such key")


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL + "extends: recipe.yaml\n")
    found = one_problem(tmp_path, "extends: base.yaml\n")
    assert found == (
        "base.yaml:3: extends: goes round in a circle (recipe.yaml -> base.yaml -> recipe.yaml)"
    )


def test_a_missing_parent_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL)
    found = problems(tmp_path, "extends: bsae.yaml\n")[-1]
    assert "recipe.yaml:1: extends: neither" in found
    assert found.endswith("did you mean `base.yaml`?")
