"""The pages for users of other tools: their tables say what `mule recipe import` does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mule.commands import recipe_import
from mule.compare.dialects.known import DIALECTS
from mule.compare.dialects.table import Key, Left
from mule.config.knobs import knobs
from mule.config.load import load_recipe
from tests.docs_pages import ROOT, commands, parts

READ = {"docs/from-axolotl.md": "axolotl", "docs/from-llama-factory.md": "llama-factory"}
TOLD = ("docs/from-nanochat.md", "docs/from-torchtune.md")
# Facts that become a setting together with others.
TOGETHER = {
    "method": "adapter.kind",
    "bits": "adapter.kind",
    "schedule": "optim.schedule",
    "optimizer": "optim.kind",
    "bf16": "train.precision",
    "micro_rows": ("train.step_rows", "train.step_examples"),
    "val_size": "data.valid_share",
    "datasets": "data.train",
    "dataset": "data.train",
    "adapter": "adapter.kind",
    "finetuning_type": "adapter.kind",
    "packing": "data.packing",
    "rl": "",
    "template": "",
}


def _rows(page: str, title: str) -> list[tuple[list[str], list[str]]]:
    """The names of theirs and of ours in each row of the table under a heading."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(lines) > 5
    cells = [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3]] for line in lines]
    return [(theirs, ours) for theirs, ours in cells]


@pytest.mark.parametrize("page", READ)
def test_a_key_becomes_what_the_page_says(page: str) -> None:
    dialect = DIALECTS[READ[page]]
    for theirs, ours in _rows(page, "Keys"):
        entry = dialect.entry(theirs[0])
        assert entry is not None, theirs
        if isinstance(entry, Left):
            assert ours == [], theirs
            continue
        assert isinstance(entry, Key)
        wanted = entry.fact if entry.fact in knobs() else TOGETHER[entry.fact]
        assert (
            ours[0] in wanted if isinstance(wanted, tuple) else ours == [wanted] * bool(wanted)
        ), theirs


@pytest.mark.parametrize(("page", "title"), [(TOLD[0], "Flags of `base_train`"), (TOLD[1], "Keys")])
def test_a_setting_of_ours_exists(page: str, title: str) -> None:
    for theirs, ours in _rows(page, title):
        assert all(name in knobs() for name in ours), theirs


@pytest.mark.parametrize("page", READ)
def test_the_file_of_the_page_is_imported_as_its_command_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in parts(page)[1] if block.language == "yaml")
    file = Path(block.lines[0].removeprefix("# "))
    file.write_text(block.text, encoding="utf-8")
    words = next(one.words for one in commands(page) if one.in_block)
    assert words[3] == str(file)
    data = [words[words.index("--data") + 1]] if "--data" in words else None
    found = recipe_import.run(file, out=Path("recipe.yaml"), data=data)
    recipe = load_recipe("recipe.yaml").recipe
    assert found["tool"] == DIALECTS[READ[page]].title and not found["unknown"]
    assert (recipe.data.train, recipe.adapter.kind) == (["chats.jsonl"], "lora")
    assert (recipe.train.epochs, recipe.train.step_rows or recipe.train.step_examples) == (3.0, 8)


def test_the_chats_of_nanochat_become_ours() -> None:
    command = next(one.words for one in commands(TOLD[0]) if one.words[:2] == ("python", "-c"))
    line = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
    ran = subprocess.run(
        [sys.executable, *command[1:3]], input=f"{line}\n{line}\n", capture_output=True, text=True
    )
    assert [json.loads(row)["messages"][1] for row in ran.stdout.splitlines()] == [
        {"role": "assistant", "content": "Ho"}
    ] * 2
