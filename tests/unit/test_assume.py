"""`mule train --model X --data ./data`: what is assumed, and the recipe that is kept of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mule.commands import assume
from mule.config.load import load_recipe
from mule.errors import ConfigError, UserError
from mule.models.config import ModelConfig
from tests.tiny_folder import write_tiny_folder

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def words(model: str | None, data: str | None) -> list[str]:
    given = [f"model.path={json.dumps(model)}"] if model else []
    return [*given, f"data.train=[{json.dumps(data)}]"] if data else given


def write_chats(file: Path, lengths: list[int]) -> None:
    """A chat for each length, of so many words."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": "cat " * length},
            ]
        }
        for number, length in enumerate(lengths)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, tiny, and chats in data/."""
    monkeypatch.chdir(tmp_path)
    write_tiny_folder(Path("tiny"), QWEN)
    write_chats(Path("data/train.jsonl"), [3] * 20)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "./data", "qwen2.5-0.5b-instruct-data"),
        ("tiny", "data/train.jsonl", "tiny-train"),
        ("runs/my sft/checkpoint-00000012", "x y.jsonl", "my-sft-x-y"),
        ("x" * 200, "data", "x" * 100),
        ("...", "___", "run"),
    ],
)
def test_a_run_is_called_by_its_model_and_data(
    home: Path, model: str, data: str, name: str
) -> None:
    assert assume.name_of(words(model, data)) == name
    assert assume.name_of([*words(model, data), "name=mine"]) == "mine"


def test_one_of_the_two_is_not_enough(home: Path) -> None:
    with pytest.raises(UserError, match="--data without a model") as caught:
        assume.name_of(words(None, "data"))
    assert "--model Qwen/Qwen2.5-0.5B-Instruct" in caught.value.hint
    with pytest.raises(UserError, match="--model without data") as caught:
        assume.name_of(words("tiny", None))
    assert "`mule init` writes an example" in caught.value.hint


def test_a_model_given_twice_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path is given twice"):
        assume.name_of([*words("tiny", "data"), "model.path=other"])


def test_what_is_assumed_of_a_small_model_and_short_chats(home: Path) -> None:
    found = assume.assumptions(words("tiny", "data"), "mine")
    assert {key: value for key, (value, _) in found.items()} == {
        "name": "mine",
        "adapter.kind": "lora",
        "data.max_seq_length": 128,
    }
    assert "of 20 chats 99% have at most" in found["data.max_seq_length"][1]


def test_what_is_said_is_not_assumed(home: Path) -> None:
    given = [*words("tiny", "data"), "adapter.kind=none", "data.max_seq_length=64"]
    assert set(assume.assumptions(given, "mine")) == {"name"}


def test_the_longest_hundredth_is_left_out(home: Path) -> None:
    write_chats(Path("data/train.jsonl"), [3] * 198 + [400, 500])
    value, reason = assume.assumptions(words("tiny", "data"), "a")["data.max_seq_length"]
    assert value == 128 and "left out" not in reason
    write_chats(Path("data/train.jsonl"), [3] * 20 + [3000] * 20)
    value, reason = assume.assumptions(words("tiny", "data"), "a")["data.max_seq_length"]
    assert value == 2048 and "2,048 is the most that is chosen unasked" in reason
    config = Path("tiny/config.json")
    config.write_text(config.read_text().replace("2048", "1024"))
    value, reason = assume.assumptions(words("tiny", "data"), "a")["data.max_seq_length"]
    assert value == 1024
    assert "1,024 is the model's context, and longer ones are left out" in reason


def test_texts_get_the_usual_length(home: Path) -> None:
    Path("book.txt").write_text("It was a dark and stormy night.\n" * 50)
    found = assume.assumptions(words("tiny", "book.txt"), "a")
    assert found["data.max_seq_length"] == (1024, "the usual length for texts")


def test_the_last_blocks_of_a_large_model_where_there_is_no_gpu() -> None:
    large = ModelConfig("qwen2", 151936, 896, 24, 14, 2, 64, 4864)
    small = ModelConfig("qwen2", 512, 64, 24, 4, 2, 16, 96)

    def blocks(config: ModelConfig, *more: str, has_gpu: bool) -> dict[str, tuple[Any, str]]:
        recipe = assume.begun([*words("base", "data"), "data.max_seq_length=64", *more])
        return assume.fitting(recipe, config, lambda: None, has_gpu=has_gpu)

    ((key, (value, reason)),) = blocks(large, has_gpu=False).items()
    assert (key, value) == ("adapter.lora.last_layers", 8)
    assert reason.startswith("no GPU: of 24 blocks the last 8 are adapted")
    assert blocks(small, has_gpu=False) == {}
    assert blocks(large, has_gpu=True) == {}
    assert blocks(large, "train.device=cpu", has_gpu=True) != {}


def test_the_recipe_that_is_kept_gives_the_same_again(tmp_path: Path) -> None:
    assumed = {
        "name": ("mine", ""),
        "adapter.kind": ("lora", "the usual way"),
        "data.max_seq_length": (256, "of 20 chats 99% have at most 212 tokens"),
    }
    given = [*words("a: b/#c", "my data"), "adapter.lora.r=3", "train.seed=7"]
    loaded = load_recipe(None, given, assumed=assumed)
    (tmp_path / "recipe.yaml").write_text(loaded.text)
    assert load_recipe(tmp_path / "recipe.yaml").recipe == loaded.recipe
    assert "max_seq_length: 256  # assumed: of 20 chats" in loaded.text
    assert "r: 3\n" in loaded.text and "beta1" not in loaded.text
    assert (loaded.recipe.name, loaded.recipe.adapter.kind) == ("mine", "lora")


def test_what_is_said_goes_before_what_is_assumed() -> None:
    assumed = {"adapter.kind": ("lora", "x"), "adapter.lora.last_layers": (8, "y")}
    loaded = load_recipe(None, [*words("m", "d"), "adapter.kind=none"], assumed=assumed)
    assert loaded.recipe.adapter.kind == "none"
    assert "last_layers" not in loaded.text and "assumed" not in loaded.text


def test_each_is_told_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    from mule import progress

    told: list[str] = []

    class Listener(progress.Silence):
        def note(self, text: str, level: str) -> None:
            told.append(text)

    with progress.using(Listener()):
        assume.tell({"name": ("a", ""), "adapter.kind": ("lora", "the usual way")})
    assert told == ["assumed: adapter.kind=lora (the usual way)"]
