"""The catalogue of published setups: every value has a source, and hearsay is set right."""

from __future__ import annotations

from pathlib import Path

import pytest

from mule.compare.catalogue import PUBLISHED, catalogue, named, read_entry
from mule.compare.derive import completed
from mule.compare.parameters import BY_KEY, hours, rate, short
from mule.compare.sourced import Setup, Value
from mule.errors import ConfigError, UserError

ASKED_FOR = (
    *("alpaca-7b", "vicuna-7b", "vicuna-13b", "llama-2-chat-7b-sft", "dolly-v2-12b", "dolly-v2-3b"),
    *("falcon-7b-instruct", "zephyr-7b-sft", "tulu-2-7b", "tulu-3-8b-sft", "smollm2-135m"),
    *("smollm2-360m", "smollm2-135m-sft", "olmo-2-7b-sft", "tinyllama-1.1b", "nanochat-d24"),
    *("nanochat-d24-sft", "mamba-124m-114k", "small-112m-75k"),
)


def test_the_published_setups_are_there() -> None:
    assert set(ASKED_FOR) <= catalogue().keys()
    assert {"adapter", "fine-tune", "pretrain"} == {s.kind for s in catalogue().values()}


@pytest.mark.parametrize("name", sorted(file.stem for file in PUBLISHED.glob("*.yaml")))
def test_every_value_has_a_source(name: str) -> None:
    setup = catalogue()[name]
    assert setup.values
    for key, value in setup.values.items():
        assert key in BY_KEY and setup.shown(key), key
        assert len(value.source) > 5, f"{key} has no source"
        assert value.checked is not bool(value.rests_on), key
        if setup.origin == "published":  # a page, a file at a commit, a paper's section, arithmetic
            said = ("http", "arXiv", "computed:", "default of", "the model's name")
            assert any(word in value.source for word in said), f"{key}: {value.source}"


def test_primary_sources_against_hearsay() -> None:
    alpaca = catalogue()["alpaca-7b"]
    assert alpaca.get("weight_decay") == 0 and alpaca.get("precision") == "bf16"
    assert alpaca.shown("warmup_share") == "3%" and alpaca.number("steps") == 1219
    assert alpaca.get("batch_rows") == 128 and alpaca.get("learning_rate") == 2e-5
    assert alpaca.hearsay[0][0] == "weight decay 1"
    assert catalogue()["vicuna-13b"].get("epochs") == 3
    llama = catalogue()["llama-2-chat-7b-sft"]
    assert [llama.get(key) for key in ("rows", "learning_rate", "batch_rows", "epochs")] == [
        *(27_540, 2e-5, 64, 2)
    ]
    dolly = catalogue()["dolly-v2-12b"]
    assert [dolly.get(key) for key in ("learning_rate", "epochs", "batch_rows", "precision")] == [
        *(5e-6, 2, 48, "bf16")
    ]


def test_what_follows_carries_its_arithmetic_and_its_doubt() -> None:
    steps = catalogue()["alpaca-7b"].values["steps"]
    assert steps.source.startswith("computed: 52,002 examples x 3 epochs / 128 an update")
    assert not steps.checked and "52K" in steps.rests_on  # the count was not read at its source
    mamba = catalogue()["mamba-124m-114k"]
    assert mamba.number("pretraining_rate") == pytest.approx(3e-4)
    assert mamba.number("epochs") == pytest.approx(42.1, abs=0.01)
    assert catalogue()["small-112m-75k"].number("epochs") == pytest.approx(0.3413, abs=1e-4)
    assert catalogue()["gpt2-124m"].number("tokens_per_parameter") == pytest.approx(2419, abs=1)


def test_what_is_said_is_not_computed_over() -> None:
    values = {
        "batch_rows": 4,
        "max_seq_length": 8,
        "batch_tokens": 30,
        "lora_r": 0,
        "lora_alpha": 2,
    }
    setup = Setup("x", "x", "adapter", "recipe", {k: Value(v, "here") for k, v in values.items()})
    done = completed(setup)
    assert done.get("batch_tokens") == 30 and "lora_scale" not in done.values  # not by nothing
    assert done.get("learning_rate") is None and done.number("model") is None


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="not in the catalogue") as caught:
        named("alpaca-7")
    assert "did you mean `alpaca-7b`?" in caught.value.hint and "--list" in caught.value.hint


GOOD = """\
title: A
kind: fine-tune
sources: {page: "https://example.org"}
values:
  rows: {is: 5, from: page}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("from: page", "from: nowhere", "its source `nowhere` is not among the file's sources"),
        (
            "from: page}",
            "from: page, checked: false}",
            "what was not checked says what it rests on",
        ),
        ("from: page}", "from: page, rests_on: memory}", "what was not checked says what it rests"),
        (", from: page", "", "values.rows.from: Field required"),
        ("rows:", "row:", "row: not a parameter; did you mean `rows`?"),
        ('example.org"}', 'example.org", other: b}', "the source `other` is of no value"),
        ("kind: fine-tune", "kind: tune", "kind: Input should be"),
        ("title: A", "title: [", "not valid YAML"),
    ],
)
def test_a_file_without_sources_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(GOOD)
    assert read_entry(file).get("rows") == 5
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_entry(file)
    assert message in str(caught.value) and "docs/compare.md" in caught.value.hint


def test_figures_in_words() -> None:
    assert [short(n) for n in (52_002, 134_515_008, 6.7e9, 2e12, 1.25)] == [
        *("52,002", "134.5M", "6.7B", "2T", "1.25")
    ]
    assert [rate(n) for n in (2e-5, 7.5e-4, 0.02, 0.0)] == ["2e-5", "7.5e-4", "2e-2", "0"]
    assert [hours(n) for n in (0.01, 0.5, 43, 2160)] == ["36 s", "30 min", "43 h", "90 days"]
