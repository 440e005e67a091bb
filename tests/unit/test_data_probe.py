"""The sample that stays with a run: few, spread, held out, and the same every time."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mule.config.schema import DataSection
from mule.data.hold_out import decide_split
from mule.data.prepare import RowSettings, read_options
from mule.data.probe import held_out_sample
from mule.data.sources import read
from mule.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["The capital of France is Paris, of Spain Madrid.\n" * 9], 300)


def _write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _texts(count: int, words: str = "is Paris.") -> list[dict[str, Any]]:
    return [{"text": f"Document {n} {words}"} for n in range(count)]


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (16, 16), (17, 9), (32, 16), (500, 16)])
def test_at_most_sixteen_spread_over_all(tmp_path: Path, count: int, expected: int) -> None:
    data = DataSection(train=["absent"], valid=[_write(tmp_path / "v.jsonl", _texts(count))])
    sample = held_out_sample(data, 5, TOKENIZER)
    numbers = [int(text.split()[1]) for text in sample["texts"]]
    assert len(numbers) == expected
    assert numbers[0] == 0 and numbers[-1] >= 0.9 * (count - count / expected)
    assert len({b - a for a, b in pairwise(numbers)}) <= 1
    assert sample == {"texts": sample["texts"], "rendered": False, "prompts": []}


def test_only_what_is_held_out_and_only_its_beginning(tmp_path: Path) -> None:
    file = _write(tmp_path / "t.jsonl", _texts(90, "speaks of Paris and Spain. " * 100))
    data = DataSection(train=[file], valid_share=0.1)
    sample = held_out_sample(data, 5, TOKENIZER)
    held = decide_split(lambda: read([file]), 0.1, 5).held.nonzero()[0].tolist()
    assert [int(text.split()[1]) for text in sample["texts"]] == held
    assert {len(text) for text in sample["texts"]} == {2000}
    assert sample == held_out_sample(data, 5, TOKENIZER)
    assert sample != held_out_sample(data, 6, TOKENIZER)


def test_without_validation_it_is_of_the_training_rows(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Is {n} Paris?"},
                {"role": "assistant", "content": "No."},
            ]
        }
        for n in range(3)
    ]
    data = DataSection(train=[_write(tmp_path / "t.jsonl", rows)], valid_share=0)
    sample = held_out_sample(data, 5, TOKENIZER)
    assert sample["rendered"] is True
    assert [prompt[0]["content"] for prompt in sample["prompts"]] == [
        f"Is {n} Paris?" for n in range(3)
    ]
    assert all(text.endswith("No.<|im_end|>\n") for text in sample["texts"])


def test_up_to_fifty_prompts_beside_sixteen_texts(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Is it Paris?"}, {"role": "assistant", "content": "No."}]
    file = _write(tmp_path / "t.jsonl", [{"messages": turns}] * 120)
    sample = held_out_sample(DataSection(train=["absent"], valid=[file]), 5, TOKENIZER)
    assert (len(sample["prompts"]), len(sample["texts"])) == (30, 15)  # each fourth, each eighth


def test_settings_are_those_of_the_recipe() -> None:
    data = DataSection(
        train=["x"],
        format="alpaca",
        columns={"instruction": "question"},
        max_seq_length=77,
        packing=False,
        too_long="error",
    )
    settings = RowSettings.of(data)
    assert settings.read == read_options(data)
    assert (settings.read.format, settings.read.columns) == (
        "alpaca",
        (("instruction", "question"),),
    )
    assert (settings.max_seq_length, settings.packing, settings.too_long) == (77, False, "error")
