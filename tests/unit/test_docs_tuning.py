"""docs/tuning.md: its defaults are the schema's, its figures the code's, and no knob is forgotten."""

from __future__ import annotations

import re

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mule.commands import assume
from mule.config.docs import _default
from mule.config.knobs import knobs
from mule.config.load import load_recipe
from mule.config.schema import ExportSection
from mule.doctor.rules import all_rules, rule_texts
from mule.plan import fine_tune
from mule.plan.length import learning_rate
from tests.docs_pages import ROOT

PAGE = "docs/tuning.md"
NOT_TUNED = {
    "adapter.engine": "what computes it: docs/apple-silicon.md",
    "adapter.warm_start": "what it begins with: docs/adding-knowledge.md",
}
_ROW = re.compile(r"^\| `([a-z_0-9.]+)` \| (.+) \|$", re.MULTILINE)
_BLOCK_TYPES = {"q5_k_m": "Q5_K", "q5_k_s": "Q5_K", "q4_k_m": "Q4_K", "q4_k_s": "Q4_K"}
_BLOCK_TYPES |= {"q3_k_m": "Q3_K", "q2_k": "Q2_K"}


def _sections() -> dict[str, str]:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _tables() -> dict[str, str]:
    """Setting -> the default that the page gives."""
    rows = [row for text in _sections().values() for row in _ROW.findall(text)]
    found = {key: shown for key, shown in rows if "." in key}
    assert len(found) == len([key for key, _ in rows if "." in key]), "a setting stands there twice"
    return found


@pytest.mark.parametrize(("key", "shown"), _tables().items())
def test_a_default_is_that_of_the_schema(key: str, shown: str) -> None:
    knob = knobs()[key]
    if knob.default in (None, [], {}):
        assert shown in ("chosen", "off", "none")
    else:
        assert shown == _default(knob)


def test_every_setting_that_changes_what_is_learned_has_its_place() -> None:
    wanted = {
        key
        for key, knob in knobs().items()
        if knob.role == "identity" and knob.section.split(".")[0] in ("train", "optim", "adapter")
    }
    assert wanted - _tables().keys() == NOT_TUNED.keys()


def test_every_section_says_what_the_doctor_says() -> None:
    for title, text in _sections().items():
        if _ROW.search(text) and title not in ("Seed", "Schedule", "Quantisation types"):
            assert "- **`mule doctor`**: " in text, title
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    codes = {rule.code for rule in all_rules()}
    assert set(re.findall(r"\[(D\d+)\]", text)) <= codes


@pytest.mark.parametrize("code", rule_texts())
def test_a_rule_whose_remedy_is_a_knob_of_the_page_is_named_there(code: str) -> None:
    remedy = rule_texts()[code].split("What to do:")[1].split("Source:")[0]
    named = [key for key in _tables() if key in " ".join(remedy.split())]
    if named:
        assert f"[{code}]" in (ROOT / PAGE).read_text(encoding="utf-8"), named


# ---------------------------------------------------------------- figures


def test_the_rates_are_those_that_are_chosen() -> None:
    new, tuned = ["model.size=25m"], ["model.path=x"]
    recipes = [new, [*tuned, "adapter.kind=lora"], tuned]
    rates = [
        fine_tune.chosen_rate(load_recipe(None, words, complete=False).recipe)[0]
        for words in recipes
    ]
    said = "{:.0e} for a new model, {:.0e} for an adapter, {:.0e} for all weights".format(*rates)
    assert re.sub(r"e-0", "e-", said) in _sections()["Learning rate"]


def test_the_warm_up_is_the_one_that_is_chosen() -> None:
    recipe = load_recipe(None, ["model.size=25m"], complete=False).recipe
    chosen = [learning_rate(recipe, steps)["warmup_steps"] for steps in (1000, 10**6, 5)]
    assert chosen == [50, 500, 1]
    assert "5% of the run, at most 500 updates, at least 1" in _sections()["Warm-up"]


def test_length_and_batch_are_those_that_are_chosen() -> None:
    epochs = [fine_tune.chosen_epochs(count) for count in (1, 1000, 10**6)]
    assert epochs == [10, 3, 1]
    assert "3 epochs, more over few chats (10 at most)" in _sections()["Epochs and length"]
    sizes = [fine_tune.chosen_examples(count) for count in (1, 1000, 10**6)]
    assert sizes == [4, 10, 16]
    assert "a hundredth of them, 4 at least and 16 at most" in _sections()["Size of an update"]


def test_the_other_figures_are_those_of_the_code() -> None:
    factor = knobs()["adapter.lora.alpha"].default / knobs()["adapter.lora.r"].default
    assert f"By itself the factor is {factor:g}" in _sections()["LoRA alpha"]
    rows = f"{assume._MOST_ROWS:.0%} of the chats need, at most {assume._MAX_LENGTH:,}"
    assert rows in _sections()["Length of a row"]
    targets = _sections()["LoRA targets"]
    assert f"adapter.lora.last_layers={assume._LAST_LAYERS}`" in targets
    assert f"more than {assume._SMALL_PARAMS // 10**6}M weights" in targets
    held_out = knobs()["data.valid_share"].description
    for said in ("a fifth of the chats", "at most 400", "none of fewer than 5"):
        assert said in _sections()["What is held out"]
        assert said.split()[-1] in held_out
    assert "documents 0.02" in held_out and "documents 2%" in _sections()["What is held out"]


def test_the_types_are_all_there_with_the_bits_of_their_blocks() -> None:
    text = _sections()["Quantisation types"]
    shown = {
        name: float(bits)
        for names, bits in re.findall(r"^\| (`.+?`) \| ([\d.]+) \|", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    schema = ExportSection.model_json_schema()["properties"]["types"]["items"]["enum"]
    assert set(shown) == set(schema)
    for name, bits in shown.items():
        kind = GGMLQuantizationType[_BLOCK_TYPES.get(name, name.upper())]
        weights, size = GGML_QUANT_SIZES[kind]
        assert abs(bits - 8 * size / weights) < 0.01, name
