"""Answers judged: read as pairs, refused for training with the command that keeps the good ones."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mule.data.sources import Conversation, Message, Preference, ReadOptions, read, scan
from mule.errors import DataError


def _write(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _shared(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": value} for role, value in turns]


_USER, _GOOD, _BAD = Message("user", "a"), Message("assistant", "g"), Message("assistant", "b")


@pytest.mark.parametrize(
    ("row", "command"),
    [
        ({"prompt": "a", "chosen": "g", "rejected": "b"}, "{prompt, completion: .chosen}"),
        (
            {
                "prompt": _chat(("user", "a")),
                "chosen": _chat(("assistant", "g")),
                "rejected": _chat(("assistant", "b")),
            },
            "{messages: ((.prompt // []) + .chosen)}",
        ),
        (
            {
                "chosen": _chat(("user", "a"), ("assistant", "g")),
                "rejected": _chat(("user", "a"), ("assistant", "b")),
            },
            "{messages: ((.prompt // []) + .chosen)}",
        ),
        (
            {
                "conversations": _shared(("human", "a")),
                "chosen": _shared(("gpt", "g"))[0],
                "rejected": _shared(("gpt", "b"))[0],
            },
            "{conversations: (.conversations + [.chosen])}",
        ),
        (
            {"instruction": "a", "input": "", "output": "g", "chosen": "g", "rejected": "b"},
            "{instruction, input, output: .chosen}",
        ),
    ],
)
def test_pairs_of_answers(tmp_path: Path, row: dict, command: str) -> None:
    file = _write(tmp_path, row)
    assert list(scan(file)) == [
        Preference((_USER,), (_GOOD,), (_BAD,), None, str(file), 1),
    ]
    with pytest.raises(DataError, match="does not train on") as caught:
        list(read([file]))
    rows = '(if type == "array" then .[] else . end)'
    assert caught.value.hint == (
        f"train on the good answers alone: cat {file} | jq -c '{rows} | {command}' > chosen-a.jsonl"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": _chat(("user", "a"), ("assistant", "g"))},
        {"prompt": "a", "completion": "g"},
        {"conversations": _shared(("human", "a"), ("gpt", "g"))},
        {"instruction": "a", "output": "g"},
    ],
)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("label", [True, False])
def test_judged_answers(tmp_path: Path, row: dict, key: str, label: bool) -> None:
    file = _write(tmp_path, {**row, key: label})
    chosen, rejected = ((_GOOD,), ()) if label else ((), (_GOOD,))
    assert list(scan(file)) == [Preference((_USER,), chosen, rejected, label, str(file), 1)]
    with pytest.raises(DataError, match=rf"select\(.{key}\) \| del\(.{key}\)"):
        list(read([file], ReadOptions("preference")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": 1}, '"label" is a number, not true or false'),
        ({"messages": _chat(("user", "a")), "label": True}, "no answer to judge"),
        ({"chosen": "a", "rejected": "b"}, 'no "prompt", and the two answers do not begin alike'),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "an assistant message is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, '"rejected" is a number'),
    ],
)
def test_preferences_that_cannot_be_read(tmp_path: Path, row: dict, message: str) -> None:
    (error,) = scan(_write(tmp_path, row))
    assert isinstance(error, DataError) and message in error.what and error.hint


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "g", "rejected": "b"},
        {"instruction": "a", "input": "", "output": "g", "chosen": "g", "rejected": "b"},
        {"prompt": _chat(("user", "a")), "chosen": _chat(("gpt", "g")), "rejected": []},
        {"messages": _chat(("user", "a"), ("gpt", "g")), "label": True},
    ],
)
def test_the_command_it_names_works(tmp_path: Path, row: dict, as_list: bool) -> None:
    file = _write(tmp_path, row)
    if as_list:
        file.write_text(json.dumps([row]))
    with pytest.raises(DataError) as caught:
        list(read([file]))
    command = caught.value.hint.partition(": ")[2]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    (found,) = read([tmp_path / "chosen-a.jsonl"])
    assert isinstance(found, Conversation)
    assert [m.content for m in found.messages] == ["a", "g"]
