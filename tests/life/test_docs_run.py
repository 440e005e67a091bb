"""The commands of pages for beginners, run in their order in an empty folder.

docs/fine-tune-on-your-laptop.md, from-donkeytune.md and choose-a-model.md: test_to_gguf.py;
docs/export.md: test_export_page.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.docs_pages import Shown, commands, parts
from tests.life.test_to_gguf import FEW, MODEL
from tests.life.tiny_life import Forker
from tests.tiny_folder import write_tiny_folder
from tests.unit.test_assume import QWEN

# What is left out, and why.
LEFT_OUT = {
    "mule demo": "minutes; test_cli_life.py runs mule demo --fast",
    "mule chat demo/exports/atlas-Q4_K_M.gguf --prompt What is the capital of France?": "likewise",
    "mule ui": "a server, which does not end; tests/browser uses it",
    "mule data check hawaiian-pizza": "shown with its output; the data is not in the repository",
    "mule data preview glaive_toolcall_en_demo.json --n 1": "likewise",
    "mule plan base.yaml --machine h100x8": "a model of 110M parameters",
    "mule train base.yaml": "likewise",
    "mule train model.path=runs/base data.train=[chats.jsonl] --name sft": "likewise",
    "mule chat runs/sft": "likewise",
}
# Another exit code than 0, and why.
ENDS_WITH = {"mule doctor lower": 1}  # the model that stands in is untrained: alarm D802
CHATS = [("When do you open?", "At nine."), ("Do you deliver?", "Yes, within ten kilometres.")]


def _chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    roles = {"user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}


def _lines(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _chats(folder: Path, name: str, count: int = 60) -> None:
    words = "chain brake wheel light saddle pump bell lock tyre pedal".split()
    rows: list[dict[str, object]] = [
        {
            **_chat(
                f"{name}: what of {words[n % 10]} {n}?", f"The {words[n % 7]} number {n} is fine."
            )
        }
        for n in range(count)
    ]
    _lines(folder / name, rows)


def _for_data(home: Path) -> None:
    """What docs/data.md names."""
    write_tiny_folder(home / "MODEL", QWEN)
    for name in ("chats.jsonl", "jokes.jsonl"):
        _chats(home, name)
    for shop in ("shop-2024", "shop-2025"):
        _chats(home, f"{shop}/train.jsonl")
        _chats(home, f"{shop}/valid.jsonl", 8)
    alpaca = [
        {"instruction": f"Name thing {n}.", "input": "", "output": f"Thing {n}."} for n in range(30)
    ]
    (home / "alpaca.json").write_text(json.dumps(alpaca))
    sums = [
        {"question": f"What is {n} plus {n}?", "answer": f"It is #### {2 * n}"} for n in range(30)
    ]
    (home / "gsm8k" / "main").mkdir(parents=True)
    parquet.write_table(
        pa.Table.from_pylist(sums), home / "gsm8k/main/train-00000-of-00001.parquet"
    )
    _lines(home / "gsm8k/test.jsonl", [{"question": "How many legs?", "answer": "Four #### 4"}])
    _lines(home / "gsm8k.jsonl", [dict(row) for row in sums])
    dolly = [
        {
            "instruction": f"Say {n}.",
            "context": "",
            "response": f"{n} it is.",
            "category": "open_qa",
        }
        for n in range(30)
    ]
    _lines(home / "dolly.jsonl", [dict(row) for row in dolly])
    oasst: list[dict[str, object]] = []
    for n in range(20):
        for who, parent in (("prompter", None), ("assistant", f"{n}prompter")):
            oasst.append(
                {
                    "message_id": f"{n}{who}",
                    "parent_id": parent,
                    "role": who,
                    "text": f"{who} says {n}",
                    "rank": 0,
                }
            )
    _lines(home / "oasst.jsonl", oasst)
    (home / "mix.yaml").write_text(
        "name: three\nmodel: {path: MODEL}\nadapter: {kind: lora}\n"
        "data: {train: [alpaca.json, gsm8k.jsonl, dolly.jsonl], valid_share: 0.1}\n"
    )


def _for_recipes(page: str) -> Callable[[Path], None]:
    """The recipes that the page shows, by the name in their first line; a model, and chats."""

    def prepare(home: Path) -> None:
        write_tiny_folder(home / MODEL, QWEN)
        _chats(home, "chats.jsonl")
        _chats(home, "data/train.jsonl")
        _chats(home, "data/valid.jsonl", 8)
        for block in parts(page)[1]:
            if block.language == "yaml" and (name := re.match(r"# (\S+\.ya?ml)", block.lines[0])):
                (home / name[1]).write_text(block.text)

    return prepare


def _for_start(home: Path) -> None:
    """What the demo leaves: a model that answers, here an untrained one."""
    write_tiny_folder(home / "demo" / "runs" / "sft", QWEN)


PAGES: dict[str, tuple[int, Callable[[Path], None]]] = {
    "docs/get-started.md": (10, _for_start),
    "docs/data.md": (10, _for_data),
    "docs/tuning.md": (5, _for_recipes("docs/tuning.md")),
    "docs/from-axolotl.md": (3, _for_recipes("docs/from-axolotl.md")),
    "docs/from-llama-factory.md": (3, _for_recipes("docs/from-llama-factory.md")),
    "docs/from-nanochat.md": (1, _for_recipes("docs/from-nanochat.md")),
}


def _in_order(page: str) -> list[Shown]:
    """The commands of the blocks that are run."""
    return [
        shown
        for shown in commands(page)
        if shown.in_block and shown.words[0] == "mule" and " ".join(shown.words) not in LEFT_OUT
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs(forker: Forker, tmp_path: Path, page: str) -> None:
    count, prepare = PAGES[page]
    steps = _in_order(page)
    assert len(steps) == count
    prepare(tmp_path)
    for shown in steps:
        few = FEW.split() if shown.words[1] == "train" else []
        code = forker.run(tmp_path, *shown.words[1:], *few)
        assert code == ENDS_WITH.get(" ".join(shown.words), 0), (
            f"{shown}\n{(tmp_path / 'output.log').read_text()[-3000:]}"
        )


def test_nothing_is_left_out_for_nothing() -> None:
    shown = {" ".join(one.words) for page in PAGES for one in commands(page)}
    assert (LEFT_OUT.keys() | ENDS_WITH.keys()) <= shown
