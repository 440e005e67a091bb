"""`mule data check` as a command: which files, what comes next, the repaired copies, the page."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mule.cli.render_check import print_check
from mule.commands import data_check
from mule.errors import UserError
from tests.unit.test_data_check import _chat, _chats, _write

_BROKEN = "The cafÃ© number {} is dÃ©jÃ  closed for the winter."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 rows to train on, 3 held out: one of them leaks, and two rows are double-encoded."""
    rows = [*_chats(58), _chat(58, _BROKEN.format(1)), _chat(59, _BROKEN.format(2))]
    (tmp_path / "chats").mkdir()
    _write(tmp_path / "chats" / "train.jsonl", rows)
    _write(tmp_path / "chats" / "valid.jsonl", [_chat(90), _chat(7), _chat(91)])
    return tmp_path / "chats"


def _codes(result: dict[str, Any]) -> list[str]:
    return [problem["code"] for problem in result["problems"]]


def test_the_validation_beside_the_training_file_is_checked(folder: Path) -> None:
    result = data_check.run([str(folder)])
    assert [(file["part"], file["rows"]) for file in result["files"]] == [
        ("train", 60),
        ("valid", 3),
    ]
    assert _codes(result) == ["leak", "mojibake"] and not result["ok"]
    assert "throw-away tokenizer" in result["tokenizer"]
    assert result["repaired"] is None


def test_a_test_file_counts_as_held_out(folder: Path) -> None:
    (folder / "valid.jsonl").rename(folder / "test.jsonl")
    result = data_check.run([str(folder)])
    assert [file["part"] for file in result["files"]] == ["train", "test"]
    assert "leak" in _codes(result)


def test_validation_files_given_by_hand(tmp_path: Path) -> None:
    train = _write(tmp_path / "a.jsonl", _chats())
    other = _write(tmp_path / "b.jsonl", [_chat(7)])
    result = data_check.run([str(train), f"data.valid={other}"])
    assert _codes(result) == ["leak"] and result["rows"] == 60


def test_settings_of_the_recipe_count(tmp_path: Path) -> None:
    train = _write(tmp_path / "a.jsonl", _chats())
    result = data_check.run([str(train), "data.max_seq_length=8", "data.too_long=truncate"])
    (problem,) = result["problems"]
    assert problem["message"] == (
        "every row is longer than data.max_seq_length=8 and would be cut off"
    )


def test_what_comes_next(folder: Path, tmp_path: Path) -> None:
    result = data_check.run([str(folder)])
    assert result["next"] == f"mule data check {folder} --fix-encoding"
    (hint,) = [p["hint"] for p in result["problems"] if p["code"] == "mojibake"]
    assert hint == f"mule data check {folder} --fix-encoding writes repaired copies"
    clean = _write(tmp_path / "clean.jsonl", _chats())
    assert data_check.run([str(clean)])["next"] == f"mule data preview {clean}"
    repeated = _write(tmp_path / "repeated.jsonl", [*_chats()[:1]] * 9)
    found = data_check.run([str(repeated)])["next"]
    assert found == f"mule data mix {repeated} --out FOLDER"
    broken = _write(tmp_path / "broken.jsonl", [*_chats(), {"messages": []}])
    assert data_check.run([str(broken)])["next"] == f"mule data check {broken}"


def test_fix_encoding_writes_copies_beside_the_folder(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    result = data_check.run([str(folder)], fix_encoding=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    fixed = folder.parent / "chats-fixed"
    assert result["repaired"] == {str(fixed / "train.jsonl"): 2}
    assert (fixed / "valid.jsonl").read_bytes() == before["valid.jsonl"]
    lines = (fixed / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[58])["messages"][1]["content"] == (
        "The café number 1 is déjà closed for the winter."
    )
    assert _codes(result) == ["leak"]  # of the copies
    assert {file["file"] for file in result["files"]} == {
        str(fixed / "train.jsonl"),
        str(fixed / "valid.jsonl"),
    }
    assert result["next"] == f"mule data mix {fixed} --out FOLDER"


def test_fix_encoding_of_a_file_and_into_a_named_folder(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", [*_chats(), _chat(60, _BROKEN.format(1))])
    result = data_check.run([str(file)], fix_encoding=True)
    assert list(result["repaired"]) == [str(tmp_path / "a-fixed" / "a.jsonl")]
    assert result["next"] == f"mule data preview {tmp_path / 'a-fixed'}"
    named = data_check.run([str(file)], fix_encoding=True, out=tmp_path / "new")
    assert list(named["repaired"]) == [str(tmp_path / "new" / "a.jsonl")]


def test_nothing_to_repair(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", _chats())
    result = data_check.run([str(file)], fix_encoding=True)
    assert result["repaired"] == {} and result["ok"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert "nothing: no text is double-encoded, so no copy was written" in _page(result)


def test_out_without_fix_encoding_has_no_effect(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", _chats())
    with pytest.raises(UserError, match="--out has no effect without --fix-encoding"):
        data_check.run([str(file)], out=tmp_path / "x")


# ---------------------------------------------------------------- the page


def _page(result: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_check(console, result)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_page_says_the_verdict_first(folder: Path) -> None:
    lines = _page(data_check.run([str(folder)]), width=300).splitlines()
    train, valid = folder / "train.jsonl", folder / "valid.jsonl"
    assert lines[0] == f"FIX FIRST: 1 error   {train}, {valid}"
    assert lines[2] == "rows        60 conversations (messages)"
    assert lines[3] == f"held out    3 in {valid}"
    assert lines[4] == "enough for  a trial (50 to 200 rows)"
    start = lines.index("Mend before training")
    assert lines[start + 1 : start + 3] == [
        "  ✗ 1 of 3 held-out rows (33.3%) is also in the training files",
        f"      {valid}:2  same as {train}:8",
    ]
    start = lines.index("Worth a look")
    assert lines[start + 1 : start + 5] == [
        "  ! 2 rows (3.2%) with double-encoded text",
        f"      {train}:59  cafÃ© number -> café number",
        f"      {train}:60  cafÃ© number -> café number",
        f"    mule data check {folder} --fix-encoding writes repaired copies",
    ]


def test_the_page_of_clean_data(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", _chats())
    page = _page(data_check.run([str(file)]))
    assert page.startswith(f"FIT TO TRAIN   {file}\n")
    assert "Worth a look" not in page and "Mend" not in page and "Good to know" not in page
    assert "messages    user 60, assistant 60\n" in page
    assert "turns       1 answer in 60 rows\n" in page
    assert "repeated    0 rows exactly, 0 nearly (0.0%)\n" in page
    assert "█" * 32 in page


def test_the_page_counts_what_it_does_not_list(tmp_path: Path) -> None:
    rows = [*_chats(), *(_chat(n, f"Salt &amp; bread {n} of {n * n}") for n in range(60, 70))]
    rows += [_chat(n, f"Bell \x07 {n} is {n * n + 1}") for n in range(70, 77)]
    file = _write(tmp_path / "a.jsonl", rows)
    page = _page(data_check.run([str(file)]), width=60)
    assert f"      {file}:61, :62, :63, :64, :65 and 5 more\n" in page
    assert f"      {file}:73  U+0007\n      and 4 more\n" in page
    assert f"{file}:74" not in page


def test_long_rows_stand_out_in_the_histogram(tmp_path: Path) -> None:
    rows = [*_chats(), _chat(60, answer="A long answer, which has no end. " * 60)]
    page = _page(
        data_check.run([str(_write(tmp_path / "a.jsonl", rows)), "data.max_seq_length=128"])
    )
    marked = [line for line in page.splitlines() if line.endswith(" too long")]
    assert marked[-1].split()[-3:] == ["1", "too", "long"]
    assert not any(line.strip().startswith("33-64 ") for line in marked)
    assert "1 over data.max_seq_length=128" in " ".join(page.split())


def test_many_files_are_named_by_their_folder(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"A text about bread number {number}. " * 90)
    page = _page(data_check.run([str(tmp_path), "data.max_seq_length=32"]))
    assert page.splitlines()[0].endswith(f"4 files in {tmp_path}")


def test_exit_code_and_json(folder: Path, tmp_path: Path) -> None:
    from mule.cli.main import app

    bad = CliRunner().invoke(app, ["data", "check", str(folder), "--json"])
    assert bad.exit_code == 1
    result = json.loads(bad.stdout.strip().splitlines()[-1])
    assert result["ok"] is False and result["rows"] == 60 and result["format"] == "messages"
    assert 0 < result["trained_token_share"] < 1
    problem = result["problems"][0]
    assert {key: problem[key] for key in ("severity", "code", "file", "line", "message")} == {
        "severity": "error",
        "code": "leak",
        "file": str(folder / "valid.jsonl"),
        "line": 2,
        "message": "1 of 3 held-out rows (33.3%) is also in the training files",
    }
    good = _write(tmp_path / "good.jsonl", _chats())
    assert CliRunner().invoke(app, ["data", "check", str(good)]).exit_code == 0
