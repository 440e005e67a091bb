"""Data files: what each format becomes, and what each kind of bad input is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mule.data.sources import (
    Conversation,
    Document,
    ReadOptions,
    detect,
    expand,
    read,
    split_files,
)
from mule.errors import DataError, UserError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
CHAT = {
    "messages": [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": " Hello é "},
    ]
}


def _lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


# ---------------------------------------------------------------- formats


def test_text_without_mark_and_with_unix_line_ends(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.txt", b"\xef\xbb\xbfL'\xc3\xa9t\xc3\xa9\r\nend\r\n")
    assert list(read([file])) == [Document("L'été\nend\n", str(file), 1)]


def test_text_is_split_at_marker_lines_only(tmp_path: Path) -> None:
    text = (
        "one <|endoftext|> still one\n\n<|endoftext|>\n\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n"
    )
    file = _write(tmp_path, "a.txt", text)
    documents = [(d.text, d.line) for d in read([file]) if isinstance(d, Document)]
    assert documents == [("one <|endoftext|> still one", 1), ("two\nlines", 6)]


def test_messages(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.jsonl", "\n" + _lines(CHAT, CHAT))
    conversations = list(read([str(file)]))
    assert [c.line for c in conversations] == [2, 3]
    assert isinstance(conversations[0], Conversation)
    assert conversations[0].as_dicts() == CHAT["messages"]


def test_alpaca_as_lines_and_as_a_list(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say ho.", "output": "ho"},
    ]
    _write(tmp_path, "lines.json", _lines(*rows))
    _write(tmp_path, "list.jsonl", json.dumps(rows, indent=2))
    lines, items = (list(read([tmp_path / name])) for name in ("lines.json", "list.jsonl"))
    assert [[m.content for m in c.messages] for c in lines] == [
        ["Add.\n\n1 2", "3"],
        ["Say hi.", "hi"],
        ["Say ho.", "ho"],
    ]
    assert [c.messages for c in lines] == [c.messages for c in items]
    assert [c.line for c in lines] == [1, 2, 3]
    assert [c.line for c in items] == [2, 7, 12]


def test_gsm8k_lines_and_parquet_agree(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"{n} + 1?", "answer": f"<<{n}+1>>\n#### {n + 1}"} for n in range(3)]
    _write(tmp_path, "a.jsonl", _lines(*rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines, table = (list(read([tmp_path / name])) for name in ("a.jsonl", "a.parquet"))
    assert [c.messages for c in lines] == [c.messages for c in table]
    assert [(m.role, m.content) for m in table[2].messages] == [
        ("user", "2 + 1?"),
        ("assistant", "<<2+1>>\n#### 3"),
    ]
    assert [c.line for c in table] == [1, 2, 3]


def test_text_rows(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.jsonl", _lines({"text": "one"}, {"text": "two\n", "id": 7}))
    assert [d.text for d in read([file])] == ["one", "two\n"]


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.md", "hello", "text"),
        ("a.jsonl", _lines(CHAT), "messages"),
        ("a.json", json.dumps([{"instruction": "a", "output": "b"}]), "alpaca"),
        ("b.json", _lines({"question": "a", "answer": "b"}), "gsm8k"),
        ("b.jsonl", _lines({"text": "b"}), "text_rows"),
    ],
)
def test_detect(tmp_path: Path, name: str, content: str, format: str) -> None:
    assert detect(_write(tmp_path, name, content)) == format


def test_an_explicit_format_overrides_the_suffix(tmp_path: Path) -> None:
    file = _write(tmp_path, "notes.log", "plain")
    assert [d.text for d in read([file], ReadOptions("text"))] == ["plain"]
    with pytest.raises(
        DataError, match=r"notes.log: unknown kind of file '.log'(.|\n)*data.format"
    ):
        list(read([file]))
    with pytest.raises(UserError, match=r"unknown format 'txt'(.|\n)*did you mean text\?"):
        list(read([file], ReadOptions("txt")))
    with pytest.raises(UserError, match=r"unknown format 'x'(.|\n)*auto or one of messages, share"):
        list(read([file], ReadOptions("x")))


# ---------------------------------------------------------------- paths


def test_paths(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.txt", "README.md", "LICENSE.txt", "notes.log", ".hidden.txt"]
    for name in names:
        _write(tmp_path, name, "x")
    assert [f.name for f in expand([tmp_path])] == ["a.txt", "b.jsonl"]
    for name in ("train.jsonl", "train-00001-of-2.parquet", "trainer.txt", "valid.jsonl"):
        _write(tmp_path, name, "x")
    train = ["train-00001-of-2.parquet", "train.jsonl"]
    assert [f.name for f in expand([str(tmp_path)])] == train
    assert [f.name for f in split_files(tmp_path, "valid")] == ["valid.jsonl"]
    twice = expand([f"{tmp_path}/*.txt", tmp_path / "a.txt", tmp_path / "notes.log"])
    assert [f.name for f in twice] == [
        ".hidden.txt",
        "LICENSE.txt",
        "a.txt",
        "trainer.txt",
        "notes.log",
    ][1:]


def test_missing_paths_suggest(tmp_path: Path) -> None:
    _write(tmp_path, "train.jsonl", "x")
    with pytest.raises(
        DataError, match=r"trian.jsonl: no such file(.|\n)*did you mean .*/train.json"
    ):
        expand([tmp_path / "trian.jsonl"])
    with pytest.raises(DataError, match=r"no such file or folder(.|\n)*hint: look in "):
        expand([tmp_path / "zzz"])
    with pytest.raises(DataError, match=r"the folder .*/no does not exist either"):
        expand([tmp_path / "no" / "a.txt"])
    with pytest.raises(DataError, match=r"\*.csv: no file matches this pattern"):
        expand([f"{tmp_path}/*.csv"])
    (tmp_path / "inside" / "deeper").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no data file in this folder(.|\n)*its folders: deeper"):
        expand([tmp_path / "inside"])
    with pytest.raises(DataError, match=r"no data file(.|\n)*put train.jsonl in it"):
        expand([tmp_path / "inside" / "deeper"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: neither a file nor a folder"):
        expand([tmp_path / "pipe"])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="loop: no such file or folder"):
        expand([tmp_path / "loop"])


# ---------------------------------------------------------------- bad files

_GOOD = _lines(CHAT)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a.jsonl: the file is empty"),
        ("a.jsonl", " \n\n", r"a.jsonl: the file is empty"),
        ("a.txt", "", r"a.txt: the file is empty"),
        ("a.txt", "\ufeff \r\n", r"a.txt: the file is empty"),
        ("a.json", "[]", r"a.json: no rows: the list is empty"),
        (
            "a.jsonl",
            _GOOD + '{"messages": }\n' + _GOOD,
            r"a.jsonl:2: broken JSON: Expecting value \(column 14\)",
        ),
        ("a.jsonl", _GOOD + _GOOD[:40], r"a.jsonl:2: broken JSON: the file is cut off here"),
        (
            "a.json",
            "[\n" + _GOOD + ",\n" + _GOOD[:40],
            r"a.json:4: broken JSON: the file is cut off here",
        ),
        ("a.json", "[\n" + _GOOD, r"a.json:3: the list is cut off: no \] at the end"),
        ("a.json", "[\n" + _GOOD + _GOOD + "]", r"a.json:3: expected , or \] but found '\{\"mess"),
        ("a.jsonl", _GOOD + "5\n", r"a.jsonl:2: the row is a number, not an object"),
        ("a.jsonl", _GOOD + '"x"\n', r"a.jsonl:2: the row is a string, not an object"),
        ("a.jsonl", _GOOD + '{"a": NaN}\n', r"a.jsonl:2: broken JSON: NaN is not JSON"),
        (
            "a.jsonl",
            _GOOD + '{"a": 1, "a": 2}\n',
            r'jsonl:2: broken JSON: the key "a" stands there tw',
        ),
        ("a.jsonl", _GOOD + "[" * 100_000 + "\n", r"a.jsonl:2: broken JSON: nested too deeply"),
        (
            "a.jsonl",
            _GOOD + '{"a": ' + "1" * 5000 + "}\n",
            r"a.jsonl:2: broken JSON: Exceeds the lim",
        ),
        (
            "a.jsonl",
            _GOOD.encode() + b"\n{\xff\n",
            r"a.jsonl:3: invalid UTF-8 \(byte 0xff\)(.|\n)*LATI",
        ),
        ("a.txt", b"one\ntwo\nth\xe9\n", r"a.txt:3: invalid UTF-8 \(byte 0xe9\)"),
        ("a.txt", b"\xef\xbb\xbfone\nt\xe9\n", r"a.txt:2: invalid UTF-8 \(byte 0xe9\)"),
        (
            "a.txt",
            "one\ntwo".encode("utf-16"),
            r"a.txt: the file is UTF-16(.|\n)*iconv -f UTF-16 -t UT",
        ),
        ("a.jsonl", _GOOD.encode("utf-16-be"), r"a.jsonl: the file is UTF-16"),
        ("a.txt", "one\ntwo\x00", r"a.txt:2: a NUL byte"),
        ("a.parquet", b"PAR1cut", r"a.parquet: cut off or not Parquet"),
        (
            "a.jsonl",
            _lines({"ask": 1, "tell": 2}),
            r"a.jsonl:1: no known format has the keys ask, tell",
        ),
        ("a.jsonl", _lines({"text": " "}), r'a.jsonl:1: "text" is empty'),
        ("a.jsonl", _lines({"text": None}), r'a.jsonl:1: "text" is null, not a string'),
        ("a.jsonl", '{"text": "ab\\ud800"}', r'jsonl:1: "text" holds \\ud800, half of a character'),
        (
            "a.jsonl",
            _lines({"text": "a"}, {"txt": "b"}),
            r"a.jsonl:2: no known format has the keys txt",
        ),
        (
            "a.json",
            json.dumps([{"instruction": "a", "output": ["b"]}]),
            r'a.json:1: "output" is a list, not a string',
        ),
        (
            "a.jsonl",
            _lines({"question": "a", "answer": " \n"}),
            r"a.jsonl:1: an assistant message is empty",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(read([_write(tmp_path, name, content)]))
    assert caught.value.hint


_USER = {"role": "user", "content": "a"}
_ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, r'"messages" is null, not a list'),
        ([], r'"messages" is an empty list'),
        ("hi", r'"messages" is a string, not a list'),
        (["hi"], r"message 1 is a string, not an object"),
        ([_USER, {"content": "b"}], r'message 2 has no "role"'),
        ([_USER, {"role": "assistant"}], r'message 2 has no "content"'),
        ([_USER, {"role": "boss", "content": "b"}], r"unknown role 'boss'(.|\n)*system, develo"),
        ([_USER, {"role": "assistant", "content": None}], r'"content" of message 2 is null'),
        (
            [_USER, {"role": "assistant", "content": [1]}],
            r'part 1 of "content" of message 2 is a num',
        ),
        ([_USER, {**_ANSWER, "weight": 0}], r'message 2 has "weight": 0, which Mule does not'),
        ([_USER, {"role": "assistant", "content": " "}], r"an assistant message is empty"),
        ([_USER], r"no assistant message, so nothing to learn"),
        ([_ANSWER, _USER], r"message 1 is from assistant where user must speak"),
        ([_USER, _ANSWER, _ANSWER], r"message 3 is from assistant where user must speak"),
        ([_USER, _USER, _ANSWER], r"message 2 is from user where assistant must speak"),
        ([_USER, {"role": "system", "content": "s"}, _ANSWER], r"message 2 is from system where"),
        ([{"role": "system", "content": "s"}], r"no assistant message"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: object, message: str) -> None:
    file = _write(tmp_path, "a.jsonl", _lines(CHAT, {"messages": messages}))
    with pytest.raises(DataError, match=f"a.jsonl:2: .*{message}") as caught:
        list(read([file]))
    assert caught.value.hint


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="needs the development data")
@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("alpaca/alpaca_en_demo.json", 899),
        ("gsm8k/main", 7473),
        ("gsm8k", 7473),
        ("hawaiian-pizza", 320),
        ("mlx-wikisql", 1000),
        ("tinystories", 1000),
        ("books-fr", 9),
    ],
)
def test_published_files(path: str, count: int) -> None:
    assert sum(1 for _ in read([SHARED / path])) == count
