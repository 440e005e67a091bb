"""Every data file that cannot be read gets one error: file, line, reason, remedy, exit code 2."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mule.data.sources.encoding import read_text_parts
from mule.data.sources.files import data_suffix
from mule.data.sources.paths import expand
from mule.data.sources.row import Row
from mule.data.sources.rows import read_rows, scan_rows
from mule.errors import DataError
from tests.badinput.data_cases import CASES, ROW, Case, parquet

_TEXT = (".txt", ".md", ".tokens")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with other people's files, which must stay as they are."""
    (tmp_path / "theirs.jsonl").write_text(ROW)
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    before = _sums(tmp_path)
    yield tmp_path
    after = _sums(tmp_path)
    assert {name: after.get(name) for name in before} == before


def _sums(folder: Path) -> dict[str, str]:
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.is_file() and os.access(file, os.R_OK)
    }


def _read_all(file: Path) -> None:
    reader = read_text_parts if data_suffix(file) in _TEXT else read_rows
    for _ in reader(file):
        pass


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number}-{case.name}")
def test_bad_file(folder: Path, case: Case) -> None:
    file = folder / case.name
    file.write_bytes(case.content)
    with pytest.raises(DataError) as caught:
        _read_all(file)
    error = caught.value
    assert error.exit_code == 2
    assert re.search(case.message, error.message), error.message
    assert re.search(case.hint, error.hint), error.hint
    assert str(file) in error.message
    assert file.read_bytes() == case.content
    if data_suffix(file) not in _TEXT:
        problems = [found for found in scan_rows(file) if isinstance(found, DataError)]
        assert str(problems[0]) == str(error)  # told, not raised


# ---------------------------------------------------------------- what is not a file at all


def _refused(file: Path, message: str, hint: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        _read_all(file)
    assert re.search(hint, caught.value.hint), caught.value.hint
    assert caught.value.exit_code == 2


def test_missing_folder_and_no_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refused(folder / "no.jsonl", r"no\.jsonl: no such file", "check the path")
    _refused(folder / "theirs.jsonl" / "a.jsonl", "a parent of this path is a file", "check the p")
    _refused(folder / f"{'a' * 300}.jsonl", "the name is too long", "check the path")
    (folder / "inside.jsonl").mkdir()
    _refused(folder / "inside.jsonl", "a folder, not a file", "one of the files in it")

    def refuse(*_: object) -> int:  # the tests may run as root, whom no mode stops
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    _refused(folder / "my data.jsonl", "permission denied", r"chmod u\+r '.*/my data\.jsonl'")


def test_pipes_devices_sockets_and_loops(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    _refused(folder / "pipe.jsonl", r"not a regular file \(a pipe", "cat .*pipe.jsonl > data.jsonl")
    (folder / "zero.txt").symlink_to("/dev/zero")
    _refused(folder / "zero.txt", "not a regular file", "into a file first")
    (folder / "loop.csv").symlink_to(folder / "loop.csv")
    _refused(folder / "loop.csv", "a symbolic link that leads to itself", "path of the real file")
    here = os.getcwd()
    os.chdir(folder)  # the address of a socket may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket.jsonl")
            _refused(folder / "socket.jsonl", "not a regular file", "into a file first")
    finally:
        os.chdir(here)
    for name in ("pipe.jsonl", "zero.txt"):
        with pytest.raises(DataError, match="neither a file nor a folder"):
            expand([folder / name])
    with pytest.raises(DataError, match="a symbolic link that leads nowhere"):
        expand([folder / "loop.csv"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt"])
def test_a_file_that_changes_while_it_is_read(folder: Path, name: str) -> None:
    file = folder / name
    content = {
        "a.json": f"[{ROW}, {ROW}]".encode(),
        "a.csv": b"text\none\ntwo\n",
        "a.parquet": parquet({"text": ["one", "two"]}),
    }.get(name, ROW.encode() * 2)
    file.write_bytes(content)
    reader = iter(read_text_parts(file) if name == "a.txt" else read_rows(file))
    next(reader)
    with open(file, "ab") as opened:
        opened.write(b" ")
    with pytest.raises(DataError, match="the file changed while it was read") as caught:
        list(reader)
    assert "wait until whatever writes it has finished" in caught.value.hint


def test_a_lone_half_character(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "ab\\ud800"}\n')
    (row,) = read_rows(folder / "a.jsonl")
    with pytest.raises(DataError, match=r'a\.jsonl:1: "text" holds \\ud800, half of a char'):
        row.text("text")


def test_parquet_files_whose_types_differ(folder: Path) -> None:
    (folder / "a.parquet").write_bytes(parquet({"text": ["one"]}))
    (folder / "b.parquet").write_bytes(parquet({"text": [5], "more": [b"\xff"]}))
    rows = [row for name in ("a", "b") for row in read_rows(folder / f"{name}.parquet")]
    assert [row.value for row in rows] == [{"text": "one"}, {"text": 5, "more": b"\xff"}]
    with pytest.raises(DataError, match=r'b\.parquet:1: "text" is a number, not a string'):
        rows[1].text("text")


def test_text_asked_for_as_rows(folder: Path) -> None:
    (folder / "a.md").write_text("hello")
    with pytest.raises(DataError, match=r"a\.md: a \.md file holds text, not rows") as caught:
        list(read_rows(folder / "a.md"))
    assert "data.format to text" in caught.value.hint


# ---------------------------------------------------------------- going on behind a bad row


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": 1, "a": 2}\n{oops}\n5\n{"a": "\xff"}\n\n{"a": 2}\n',
            [1, "2: .*twice", "3: .*Expecting", "4: .*a number", "5: .*UTF-8", 7],
        ),
        ("a.jsonl", b'{"a": 1}\n{"a"', [1, "2: .*cut off"]),
        (
            "a.json",
            b'[{"a": 1},\n{"a": NaN},\n{"b": 1, "b": 1},\n5, {"a": 2},\n{"a": }, {"a": 3}]',
            [1, "2: .*NaN", "3: .*twice", "4: .*a number", 4, "5: .*Expecting value"],
        ),
        (
            "a.csv",
            b'a,b\n1,2\n3\n4,5,6\n7,"8\n\n"\n9,"x"y\n1,\xff\n1,2\n',
            [2, "3: .*1 cells", "4: .*3 cells", 5, "8: broken quotes", "9: .*UTF-8", 10],
        ),
        ("a.csv", b'a,b\n1,2\n3,"x\n\n4,5\n', [2, "3: a quote opens here"]),
    ],
)
def test_scan_goes_on(tmp_path: Path, name: str, content: bytes, found: list[int | str]) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    scanned = list(scan_rows(file))
    assert len(scanned) == len(found), scanned
    for item, expected in zip(scanned, found):
        if isinstance(item, Row):
            assert item.line == expected
        else:
            assert re.search(f"{name}:{expected}", item.message), item.message
