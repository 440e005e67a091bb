"""A setting that holds entries of its own: data.columns.instruction=question."""

from __future__ import annotations

from pathlib import Path

import pytest

from mule.config.dump import to_yaml
from mule.config.load import load_recipe
from mule.errors import ConfigError


def _columns(recipe: Path | None, *words: str) -> dict[str, str]:
    return load_recipe(recipe, [*words], complete=False).recipe.data.columns


def _problems(recipe: Path | None, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [*words], complete=False)
    return "\n".join(caught.value.problems)


def _recipe(folder: Path, data: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(f"data:\n{data}")
    return file


def test_entries_on_the_command_line() -> None:
    words = ["data.columns.input=context", "data.columns.output=the answer"]
    assert _columns(None, *words) == {"input": "context", "output": "the answer"}
    assert _columns(None, "data.columns={input: context}") == {"input": "context"}


def test_entries_of_a_recipe_stay_beside_those_of_the_command_line(tmp_path: Path) -> None:
    file = _recipe(tmp_path, "  columns:\n    input: context\n    output: a\n")
    assert _columns(file) == {"input": "context", "output": "a"}
    assert _columns(file, "data.columns.output=b") == {"input": "context", "output": "b"}
    loaded = load_recipe(file, ["data.columns.output=b"], complete=False).recipe
    text = to_yaml(loaded)
    assert "  columns: {input: context, output: b}\n" in text
    file.write_text(text)
    assert load_recipe(file, complete=False).recipe == loaded


def test_what_is_wrong_with_entries(tmp_path: Path) -> None:
    assert "data.columns.input=3: input: expected text, found 3; put it in quotes" in _problems(
        None, "data.columns.input=3"
    )
    said = _problems(None, "data.columns.input=a", "data.columns.input=b")
    assert "data.columns.input is given twice" in said
    assert "data.columns.input=[a: data.columns" not in _problems(None, "data.columns.input=[a")
    assert "expected entries of a name and a text, found `a`" in _problems(None, "data.columns=a")
    file = _recipe(tmp_path, "  columns:\n    input: a\n    input: b\n")
    assert _problems(file) == f"{file}:4: input: given twice; remove one"
    file = _recipe(tmp_path, "  columns:\n    input: [a]\n")
    assert _problems(file) == f"{file}:2: data.columns: input: expected text, found a list"


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (["data.format=alpaca", "data.threads=all"], "threads"),
        (["data.format=text", "data.wikitext=clean"], "wikitext"),
        (["data.format=wikitext", "data.columns.text=body"], "columns"),
        (["data.format=wikitext", "data.threads=best"], "threads"),
    ],
)
def test_what_cannot_take_effect(words: list[str], idle: str) -> None:
    said = _problems(None, *words)
    assert words[1] in said and f"cannot take effect with {words[0]}; remove it" in said
    assert load_recipe(None, words[1:], complete=False).recipe.data is not None


def test_names_of_other_tools(tmp_path: Path) -> None:
    file = _recipe(tmp_path, "  field_messages: chat\n")
    assert "no such key; Mule calls it `data.columns.messages`" in _problems(file)
