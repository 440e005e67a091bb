"""Rows come back as they were written, whatever the container, with the line where each begins."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mule.data.sources import array, encoding
from mule.data.sources.encoding import read_text_parts
from mule.data.sources.rows import Row, read_rows
from mule.errors import DataError

_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(_TEXT, inside, max_size=3),
    max_leaves=8,
)  # fmt: skip
_ROWS = st.lists(st.dictionaries(_TEXT, _VALUE, max_size=4), min_size=1, max_size=6)


def _zst(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


def _packed(content: bytes, suffix: str) -> bytes:
    """Packed in two members, as `cat a.gz b.gz` makes them."""
    half = len(content) // 2
    pack = {".gz": gzip.compress, ".zst": _zst, "": bytes}[suffix]
    return pack(content[:half]) + pack(content[half:])


def _read(name: str, content: bytes, **options: Any) -> tuple[list[Row], int]:
    """The rows, and the sum of bytes told."""
    told: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(content)
        rows = list(read_rows(file, told.append, **options))
    assert all(count > 0 for count in told)
    return rows, sum(told)


@given(
    rows=_ROWS,
    suffix=st.sampled_from(["", ".gz", ".zst"]),
    line_end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
    plain=st.booleans(),
    last=st.booleans(),
)
@settings(deadline=None)  # the machine may be busy
def test_json_lines(
    rows: list[dict], suffix: str, line_end: str, mark: str, *, plain: bool, last: bool
) -> None:
    lines = line_end.join(json.dumps(row, ensure_ascii=not plain) for row in rows)
    text = mark + lines + (line_end if last else "")
    content = _packed(text.encode(), suffix)
    found, told_bytes = _read(f"a.jsonl{suffix}", content)
    assert [row.value for row in found] == rows
    step = line_end.count("\n")
    assert [row.line for row in found] == [1 + step * n for n in range(len(rows))]
    assert told_bytes == len(content)


@given(
    rows=_ROWS,
    indent=st.sampled_from([None, 0, 2]),
    suffix=st.sampled_from(["", ".gz", ".zst"]),
    part_bytes=st.integers(1, 40),
    before=st.sampled_from(["", "\ufeff", "\n \n"]),
    plain=st.booleans(),
)
@settings(deadline=None)  # the machine may be busy
def test_a_list(
    rows: list[dict], indent: int | None, suffix: str, part_bytes: int, before: str, *, plain: bool
) -> None:
    text = before + json.dumps(rows, indent=indent, ensure_ascii=not plain) + "\n"
    content = _packed(text.encode(), suffix)
    whole_bytes = encoding._PART_BYTES
    encoding._PART_BYTES = part_bytes  # pieces end inside tokens, escapes and characters
    try:
        found, told_bytes = _read(f"a.json{suffix}", content)
    finally:
        encoding._PART_BYTES = whole_bytes
    assert [row.value for row in found] == rows
    assert [row.line for row in found] == _lines_of_objects(text, rows, indent)
    assert told_bytes == len(content)


def _lines_of_objects(text: str, rows: list[dict], indent: int | None) -> list[int]:
    start = 1 + text[: text.index("[")].count("\n")
    if indent is None:
        return [start] * len(rows)
    lines = [start + 1]
    for row in rows[:-1]:
        inside = json.dumps([row], indent=indent).count("\n") - 2
        lines.append(lines[-1] + inside + 1)
    return lines


_CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))


@given(
    rows=st.lists(st.tuples(_CELL, _CELL), min_size=1, max_size=6),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    suffix=st.sampled_from(["", ".gz", ".zst"]),
    mark=st.sampled_from(["", "\ufeff", "\n\n"]),
)
@settings(deadline=None)  # the machine may be busy
def test_csv(
    rows: list[tuple[str, str]], delimiter: str, line_end: str, suffix: str, mark: str
) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "my answer"), *rows])
    text = mark + file.getvalue()
    name = "a.tsv" if delimiter == "\t" else "a.csv"
    found, told_bytes = _read(name + suffix, content := _packed(text.encode(), suffix))
    expected = [{"prompt": one or None, "my answer": two or None} for one, two in rows]
    assert [row.value for row in found] == expected
    line = 2 + mark.count("\n")
    for row, cells in zip(found, rows):
        assert row.line == line
        line += 1 + sum(cell.count("\n") for cell in cells)
    assert told_bytes == len(content)


@given(
    texts=st.lists(_TEXT | st.none(), min_size=1, max_size=300),
    row_group_size=st.integers(1, 200),
    suffix=st.sampled_from(["", ".gz", ".zst"]),
)
@settings(max_examples=30, deadline=None)
def test_parquet(texts: list[str | None], row_group_size: int, suffix: str) -> None:
    file = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, "string")})
    pyarrow.parquet.write_table(table, file, row_group_size=row_group_size)
    content = _packed(file.getvalue(), suffix)
    found, told_bytes = _read(f"a.parquet{suffix}", content)
    assert [row.value for row in found] == [{"id": n, "text": text} for n, text in enumerate(texts)]
    assert [row.line for row in found] == list(range(1, len(texts) + 1))
    assert told_bytes == len(content)


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    part_bytes=st.integers(1, 20),
    line_end=st.sampled_from(["\n", "\r\n"]),
)
@settings(deadline=None)  # the machine may be busy
def test_text_parts(text: str, part_bytes: int, line_end: str) -> None:
    text = ("x" + text).replace("\r", "")
    whole_bytes = encoding._PART_BYTES
    encoding._PART_BYTES = part_bytes
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "a.txt")
            file.write_bytes(text.replace("\n", line_end).encode())
            parts = list(read_text_parts(file))
    finally:
        encoding._PART_BYTES = whole_bytes
    assert "".join(part for part, _ in parts) == text
    so_far = ""
    for part, line in parts:
        assert line == 1 + so_far.count("\n")
        so_far += part


# ---------------------------------------------------------------- no false alarms


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("a.csv", "text\none\n\ntwo\n", [{"text": "one"}, {"text": "two"}]),
        ("a.csv", "a,b\n1,\n", [{"a": "1", "b": None}]),
        ("a.csv", 'a;b\n"1;2";3\n', [{"a": "1;2", "b": "3"}]),
        ("a.csv", "a\tb\n1,5\t3\n", [{"a": "1,5", "b": "3"}]),
        ("a.csv", '"a;b",c\n1,3\n', [{"a;b": "1", "c": "3"}]),
        ("a.csv", ' a , b\nhe said "no", 2 \n', [{"a": 'he said "no"', "b": " 2 "}]),
        ("A.CSV", "a,b\n1,2", [{"a": "1", "b": "2"}]),
        ("a.ndjson", '\n{"a": 1}', [{"a": 1}]),
        ("a.json", '{"data": [{"a": 1}]}', [{"data": [{"a": 1}]}]),
        ("a.jsonl", '\ufeff[{"a": 1}]', [{"a": 1}]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("a.jsonl", '{"a": "\u2028\x85x"}\n', [{"a": "\u2028\x85x"}]),
        ("a.jsonl", f'{{"a": {"[" * 300}{"]" * 300}}}', None),
    ],
)
def test_good_files(name: str, text: str, values: list[dict] | None) -> None:
    rows, _ = _read(name, text.encode())
    assert values is None or [row.value for row in rows] == values


def test_a_csv_cell_of_10_mb() -> None:
    text = "x, \n" * 2_500_000
    rows, _ = _read("a.csv", f'id,text\n1,"{text}"\n2,b\n'.encode())
    assert [row.value["text"] for row in rows] == [text, "b"]
    assert [row.line for row in rows] == [2, 2_500_003]


def test_a_list_on_one_line_longer_than_a_row_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(array, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(encoding, "_PART_BYTES", 100)
    rows = [{"text": "y" * 500}] * 50
    found, _ = _read("a.json", json.dumps(rows).encode())
    assert [row.value for row in found] == rows
    rows[20] = {"text": "y" * 3000}
    with pytest.raises(DataError, match="the row that begins here is longer than ") as caught:
        _read("a.json", json.dumps(rows).encode())
    assert "a quote or bracket that is never closed" in caught.value.hint


def test_parquet_values_are_plain_and_columns_can_be_chosen() -> None:
    when = datetime.datetime(2026, 5, 4)
    rows = [{"text": "a", "inside": {"list": [1, None]}, "raw": b"\x00\xff", "when": when}]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert _read("a.parquet", file.getvalue())[0][0].value == rows[0]
    some, _ = _read("a.parquet", file.getvalue(), columns=["when", "text", "no"])
    assert some[0].value == {"text": "a", "when": when}


@pytest.mark.parametrize("rows", [0, 1])
def test_reading_stops_where_the_reader_does(tmp_path: Path, rows: int) -> None:
    """A file need not be sound behind the rows that were asked for, nor be closed by hand."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n' + "{oops\n")
    read: Callable[[], Row] = iter(read_rows(file)).__next__
    for _ in range(rows):
        assert read().value == {"a": 1}
