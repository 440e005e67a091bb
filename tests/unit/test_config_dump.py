"""What is written from a recipe loads back to it, and its fingerprint sees what matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mule.config.dump import identity_fingerprint, idle_keys, read_reasons, to_yaml, with_values
from mule.config.knobs import Knob, knobs
from mule.config.load import load_recipe
from mule.config.schema import Recipe

TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20
)


def _values(knob: Knob) -> st.SearchStrategy[Any]:
    """Values that the type of a knob accepts."""
    if knob.key in ("name", "model.size"):
        return st.sampled_from(["a", "null", "1e3"] if knob.key == "name" else ["1m", "1.5b"])
    return st.one_of(*(_branch(branch) for branch in knob.branches))


def _branch(branch: dict[str, Any]) -> st.SearchStrategy[Any]:
    if words := branch.get("enum", [branch["const"]] if "const" in branch else []):
        return st.sampled_from(words)
    if branch["type"] == "array":
        items = _branch(branch["items"])
        return st.lists(items, min_size=branch.get("minItems", 0), max_size=3, unique=True)
    if branch["type"] == "object":
        return st.dictionaries(TEXT, TEXT, max_size=3)
    if branch["type"] == "integer":
        return st.integers(branch["minimum"], min(branch.get("maximum", 10**12), 10**12))
    if branch["type"] == "number":
        return st.floats(
            branch.get("minimum", branch.get("exclusiveMinimum")),
            branch.get("maximum", branch.get("exclusiveMaximum", 1e12)),
            exclude_min="exclusiveMinimum" in branch,
            exclude_max="exclusiveMaximum" in branch,
        )
    return st.booleans() if branch["type"] == "boolean" else TEXT


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of any settings that go together."""
    recipe = Recipe()
    for key in draw(st.lists(st.sampled_from([*knobs()]), unique=True, max_size=12)):
        if key == "extends":
            continue
        try:
            recipe = with_values(recipe, {key: draw(_values(knobs()[key]))})
        except ValidationError:  # at odds with what was drawn before
            continue
    return recipe


def reload(folder: Path, text: str) -> Recipe:
    file = folder / "resolved.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, complete=False).recipe


@given(recipe=recipes())
@settings(max_examples=150, deadline=None)
def test_what_is_written_loads_back(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe
) -> None:
    folder = tmp_path_factory.mktemp("dump")
    again = reload(folder, to_yaml(recipe, {"train.seed": "a\nreason: # with marks"}))
    assert again == recipe
    assert identity_fingerprint(again) == identity_fingerprint(recipe)


def test_a_resolved_recipe_keeps_the_length_decided(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"train": {"epochs": 3.0, "step_tokens": 640}})
    decided = {"steps": 17, "step_rows": 5}  # as plan.resolve does, without checking
    resolved = recipe.model_copy(update={"train": recipe.train.model_copy(update=decided)})
    text = to_yaml(resolved, {"train.steps": "3 epochs of 5.67 updates"})
    assert "  steps: 17  # 3 epochs of 5.67 updates\n" in text
    assert "epochs:" not in text and "step_tokens" not in text
    again = reload(tmp_path, text)
    assert again.train.steps == 17
    assert identity_fingerprint(again) == identity_fingerprint(resolved)
    assert read_reasons(text) == {
        "train.steps": {"value": "17", "reason": "3 epochs of 5.67 updates"}
    }


def test_reasons_of_nested_keys_are_read_back() -> None:
    recipe = Recipe.model_validate({"adapter": {"kind": "lora"}})
    comments = {"adapter.lora.alpha": "twice r", "export.types": "the usual", "model.family": "x"}
    found = read_reasons(to_yaml(recipe, comments))
    assert {key: entry["reason"] for key, entry in found.items()} == comments
    assert found["adapter.lora.alpha"]["value"] == "16.0"


def test_the_fingerprint_sees_identity_and_nothing_else() -> None:
    plain = identity_fingerprint(Recipe())
    for key, value in {
        "train.micro_batch_rows": 3,
        "train.compile": True,
        "checkpoint.keep": 7,
        "name": "other",
        "export.types": ["f16"],
    }.items():
        assert identity_fingerprint(with_values(Recipe(), {key: value})) == plain, key
    changed = {
        "train.seed": 1,
        "train.steps": 9,
        "data.train": ["a"],
        "optim.beta1": 0.8,
        "model.hidden_size": 64,
        "adapter.kind": "lora",
    }
    prints = {identity_fingerprint(with_values(Recipe(), {k: v})) for k, v in changed.items()}
    assert len(prints | {plain}) == len(changed) + 1


def test_idle_keys_follow_the_settings() -> None:
    assert "adapter.lora.r" in idle_keys(Recipe())
    lora = with_values(Recipe(), {"adapter.kind": "lora", "model.path": "x"})
    assert "adapter.lora.r" not in idle_keys(lora)
    assert {"model.family", "tokenizer.vocab_size"} <= idle_keys(lora)


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Recipe().train.seed = 3  # pyrefly: ignore


def test_every_knob_is_described() -> None:
    for knob in knobs().values():
        assert knob.role in ("identity", "mechanical"), knob.key
        assert knob.description.endswith((".", ".)")), knob.key
        assert knob.expected(), knob.key


def test_null_that_takes_a_default_away_is_written(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["optim.max_spike=null"], complete=False).recipe
    text = to_yaml(recipe)
    assert "  max_spike: null\n" in text and "ema_decay" not in text
    again = reload(tmp_path, text)
    assert again.optim.max_spike is None
    assert identity_fingerprint(again) == identity_fingerprint(recipe)
