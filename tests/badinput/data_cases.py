"""Data files that cannot be read, each with what must be said of it.

The numbers are those of the list of bad inputs that Mule is built against.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet

ROW = '{"text": "one"}\n'
CUT = "copy the file again"


@dataclass(frozen=True)
class Case:
    """`name` is that of the file; `message` and `hint` are patterns."""

    number: str
    name: str
    content: bytes
    message: str
    hint: str


def _case(number: str, name: str, content: str | bytes, message: str, hint: str) -> Case:
    return Case(
        number, name, content.encode() if isinstance(content, str) else content, message, hint
    )


def zst(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **options)
    return file.getvalue()


def _text_cases() -> Iterator[Case]:
    empty = ("the file is empty", "put data in it")
    yield _case("1", "a.jsonl", "", rf"a\.jsonl: {empty[0]}", empty[1])
    yield _case("1", "a.csv", "", rf"a\.csv: {empty[0]}", empty[1])
    yield _case("1", "a.txt", "", rf"a\.txt: {empty[0]}", empty[1])
    yield _case("1", "a.jsonl.gz", gzip.compress(b""), rf"gz: {empty[0]}", empty[1])
    yield _case("1", "a.jsonl.zst", zst(b""), rf"zst: {empty[0]}", empty[1])
    yield _case("1", "a.jsonl.gz", b"", r"gz: the file is empty", empty[1])
    yield _case("1", "a.parquet", parquet({"text": []}), "no rows in this file", empty[1])
    yield _case("1", "a.parquet", b"", r"a\.parquet: cut off or not Parquet", CUT)
    yield _case("1", "a.json", " [\n ] ", "no rows: the list is empty", "put data in it")
    yield _case("1", "a.csv", "text,id\n", "no rows: the file has only a header", empty[1])
    yield _case("2", "a.jsonl", " \n\r\n \t", rf"a\.jsonl: {empty[0]}", empty[1])
    yield _case("2", "a.txt", "\ufeff \r\n", rf"a\.txt: {empty[0]}", empty[1])
    yield _case("2", "a.tsv", "\n\n", rf"a\.tsv: {empty[0]}", empty[1])
    for name, encoding in (
        ("UTF-16", "utf-16"),
        ("UTF-16LE", "utf-16-le"),
        ("UTF-16BE", "utf-16-be"),
        ("UTF-32", "utf-32"),
        ("UTF-32LE", "utf-32-le"),
        ("UTF-32BE", "utf-32-be"),
    ):
        for file in ("a.jsonl", "a.csv", "a.txt", "a.json"):
            content = ("[" + ROW + "]" if file == "a.json" else ROW).encode(encoding)
            yield _case(
                "5",
                file,
                content,
                rf"{file}: the file is {name}, not UTF-8",
                f"iconv -f {name} -t UTF-8 {file} > new-{file}",
            )
    latin = "text\ncaf\xe9\n".encode("latin-1")
    yield _case("5", "a.txt", latin, r"a\.txt:2: .*0xe9\) at byte 4", "Latin-1: iconv -f LATIN1")
    windows = "text\nit\u2019s\n".encode("cp1252")
    yield _case("5", "a.txt", windows, r"a\.txt:2: .*0x92\)", "Windows-1252: iconv -f CP1252")
    yield _case("5", "my a.csv", latin, r"a\.csv:2: .*0xe9", "UTF-8 'my a.csv' > 'new-my a.csv'")
    packed = gzip.compress(latin)
    yield _case("5", "a.csv.gz", packed, r"gz:2: .*0xe9", r"gunzip -c a\.csv\.gz \| iconv -f LATI")
    packed = zst(ROW.encode("utf-16"))
    yield _case("5", "a.txt.zst", packed, "is UTF-16", r"zstd -dc a\.txt\.zst \| iconv .* new-a\.t")
    bad = ROW.encode() * 3 + b'{"text": "\xff"}\n' + ROW.encode()
    yield _case("6", "a.jsonl", bad, r"a\.jsonl:4: invalid UTF-8 \(byte 0xff\) at byte 11", "iconv")
    listed = b'[{"a": 1},\n{"a": "\xc3("}]'
    yield _case("6", "a.json", listed, r"a\.json:2: invalid UTF-8 \(byte 0xc3\)", "iconv")
    cut = "é".encode()[:1]
    yield _case("6", "a.txt", b"one\n" + cut, r"a\.txt:2: invalid UTF-8 \(byte 0xc3\)", "iconv")
    nul = (r":2: a NUL byte: this is not a text file", "leave this file out")
    yield _case("7", "a.jsonl", ROW + '{"text": "\x00"}\n', rf"a\.jsonl{nul[0]}", nul[1])
    yield _case("7", "a.txt", "one\ntwo\x00", rf"a\.txt{nul[0]}", nul[1])
    yield _case("7", "a.csv", "text\na\x00b\n", rf"a\.csv{nul[0]}", nul[1])
    yield _case("7", "a.json", '[{"text": "a"},\n\x00]', rf"a\.json{nul[0]}", nul[1])


def _json_cases() -> Iterator[Case]:
    lines = "one complete JSON object a line"
    cut = "broken JSON: the file is cut off here"
    yield _case("8", "a.jsonl", ROW + ROW[:9], rf"a\.jsonl:2: {cut}", "remove this line")
    yield _case("8", "a.json", "[\n" + ROW + ",\n" + ROW[:9], rf"a\.json:4: {cut}", CUT)
    yield _case("8", "a.json", "[\n" + ROW, r"a\.json:3: the list is cut off: no \] at", CUT)
    yield _case("8", "a.json", "[\n" + ROW + ",", rf"a\.json:3: {cut}", CUT)
    yield _case("8", "a.json", "[", rf"a\.json:1: {cut}", CUT)
    yield _case(
        "9", "a.jsonl", f"\n\n{ROW}\n\n{{oops}}\n", r"a\.jsonl:6: broken JSON: Expecting p", lines
    )
    correct = "correct the JSON at this line"
    yield _case(
        "10", "a.jsonl", f"[{ROW}{ROW}]", r"a\.jsonl:2: expected , or \] but found '\{\"t", correct
    )
    yield _case(
        "10", "a.json", f"[{ROW}]\n{ROW}", r"a\.json:3: the list ends, but more follows", correct
    )
    yield _case(
        "10", "a.jsonl", ROW + f"[{ROW}]", r"a\.jsonl:2: .*Expecting ',' del.*column 17", lines
    )
    yield _case(
        "10", "a.jsonl", ROW + "[1]\n", r"a\.jsonl:2: the row is a list, not an obj", "rows?"
    )
    for value, name in (
        ("5", "a number"),
        ('"x"', "a string"),
        ("null", "null"),
        ("true", "true or false"),
    ):
        message = rf"the row is {name}, not an object"
        yield _case("11", "a.json", value, rf"a\.json:1: {message}", "every row must look like")
        yield _case("11", "a.jsonl", ROW + value, rf"a\.jsonl:2: {message}", "every row must")
        yield _case("11", "a.json", f"[\n{value}]", rf"a\.json:2: {message}", "every row must")
    for value, reason in (
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1, "b": {"c": 2, "c": 3}}', 'the key "c" stands there twice'),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "Exceeds the limit"),
    ):
        yield _case(
            "12-15", "a.jsonl", f"{ROW}{value}\n", rf"jsonl:2: broken JSON: {reason}", "row"
        )
        yield _case(
            "12-15", "a.json", f"[{ROW},\n{value}]", rf"json:3: broken JSON: {reason}", "this row"
        )
    spread = json.dumps({"data": [{"a": 1}, {"a": 2}], "n": [1]}, indent=1)
    rows = r"jq -c '\.\[\"data\"\]\[\]' a\.json > rows\.jsonl; if the object is one row: jq -c \. a"
    yield _case(
        "new", "a.json", spread, r'json:1: one JSON object over .* under "data" \(2\)', rows
    )
    flat = '{"data": [\n{"a": 1},\n{"a": 2}\n]}\n'
    yield _case("new", "a.json", flat, r'under "data" \(2\)', rows)
    two = json.dumps({"train": [{"a": 1}], "test": [{"a": 2}] * 1234}, indent=1)
    yield _case("new", "a.json", two, r'"train" \(1\) and "test" \(1,234\)', r"\"train\".*; or jq")
    one = json.dumps({"text": "a", "id": 3}, indent=1)
    over = r"json:1: a JSON object over several lines"
    yield _case("new", "a.json", one, over, r"write the object on one line: jq -c \. a\.json > row")
    yield _case("new", "a.json", one + "\n" + one, over, r"write each object on one line: jq -c \.")
    packed = gzip.compress(one.encode())
    yield _case("new", "a.json.gz", packed, "over several", r"gunzip -c a\.json\.gz \| jq -c \. >")


def _table_cases() -> Iterator[Case]:
    close = 'close it, and write each " inside'
    yield _case(
        "26", "a.csv", 'a,b\n1,2\n3,"x\n' + "4,5\n" * 99, r"csv:3: a quote opens here and is", close
    )
    yield _case(
        "26", "a.csv", 'a,b\n1,"x\n2,"y"\n3,z\n', r"a\.csv:2: broken quotes .* line 2", '""'
    )
    yield _case("26", "a.csv", 'a,b\n"x\ny","z\n', r"a\.csv:3: a quote opens here", close)
    yield _case("26", "a.csv", 'a,b\n1,"x" y\n', r"a\.csv:2: broken quotes in the row", '""')
    yield _case("27", "a.csv", "a,b,a\n1,2,3\n", r'a\.csv:1: two columns are called "a"', "rename")
    yield _case("27", "a.csv", ",text\n0,x\n", r"a\.csv:1: column 1 has no name", "index=False")
    yield _case("27", "a.csv", "1,2\n3,4\n", r"a\.csv:1: the first line must name", "prompt,compl")
    yield _case("27", "a.csv", f'"{"long " * 50}",b\n1,2\n', "it looks like a row", "add a first")
    mixed = r"a\.csv:1: the header has a comma and a semicolon: which"
    yield _case("27", "a.csv", "a;b,c\n1;2,3\n", mixed, "in quotes, or separate by tabs")
    yield _case("27", "a.tsv", "a,b\n1,2\n", r"a\.tsv:1: the header has no tab but a comma", "mv a")
    few = "add the missing cells"
    yield _case("27", "a.csv", "a,b\n1,2\n3\n", r"csv:3: the row has 1 cells, the header 2", few)
    many = "in double quotes"
    yield _case("27", "a.tsv", "a\tb\n1\t2\t3\n", r"tsv:2: the row has 3 cells, the hea", many)
    mac = r"a\.csv:1: a line end that is a single CR"
    yield _case("27", "a.csv", "a,b\r1,2\r", mac, r"tr '\\r' '\\n' < a\.csv > new-a\.csv")
    whole = parquet({"text": ["a" * 50] * 100})
    yield _case("28", "a.parquet", whole[:-10], "cut off or not Parquet", CUT)
    yield _case("28", "a.parquet", whole[: len(whole) // 2], "cut off or not Parquet", CUT)
    yield _case("28", "a.parquet", b"PAR1cut", "cut off or not Parquet", CUT)
    yield _case("28", "a.parquet.gz", gzip.compress(whole[:-9]), "cut off or not Par", CUT)
    twice = pyarrow.table([[1], [2]], names=["a", "a"])
    file = io.BytesIO()
    pyarrow.parquet.write_table(twice, file)
    yield _case("27", "a.parquet", file.getvalue(), 'two columns are called "a"', "rename one")
    text = pyarrow.array([b"one", b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    bad = parquet({"text": text})
    yield _case("6", "a.parquet", bad, r"parquet:2: a value that cannot be read", "as UTF-8")


def _packed_cases() -> Iterator[Case]:
    again = "copy or download the file again"
    packed = gzip.compress((ROW * 1000).encode())
    cut = r"gz: cut off or damaged gz data"
    yield _case("8", "a.jsonl.gz", packed[:-12], cut, again)
    yield _case("8", "a.jsonl.gz", packed[:5], cut, again)
    yield _case("8", "a.jsonl.gz", packed[:-6] + b"\x00" * 6, cut, again)
    yield _case("8", "a.jsonl.gz", packed + b"more", cut, again)
    frame = zst((ROW * 1000).encode())
    yield _case("8", "a.jsonl.zst", frame[:-3], "zst: cut off or damaged zst data", again)
    yield _case("8", "a.jsonl.zst", frame + b"more", "cut off or damaged zst data", again)
    other = r"the name says \.gz, but the content is not"
    yield _case("new", "a.jsonl.gz", ROW, other, r"mv a\.jsonl\.gz a\.jsonl")
    yield _case("new", "a.jsonl", packed, "the content is gzip", r"mv a\.jsonl a\.jsonl\.gz")
    yield _case("new", "a.csv", frame, "the content is zstd", r"mv a\.csv a\.csv\.zst")
    yield _case("new", "a.json", b"PK\x03\x04", "the content is a zip", r"mv a\.json a\.json\.zip")
    yield _case("31", "a.zip", b"PK\x03\x04", r"not read \.zip archives", "unpack it: unzip a.zip")
    yield _case("31", "a.tar.gz", packed, r"not read \.tar archives", r"tar -xf a\.tar\.gz")
    for suffix, hint in (
        (".tgz", r"tar -xf a\.tgz"),
        (".7z", r"7z x a\.7z"),
        (".rar", r"unrar x a\.rar"),
        (".bz2", r"bunzip2 -k a\.bz2"),
        (".xz", r"xz -dk a\.xz"),
    ):
        yield _case("31", f"a{suffix}", b"x", f"not read {suffix} archives", hint)
    for suffix, hint in (
        (".arrow", r"from_file\('a\.arrow'\)"),
        (".xlsx", r"libreoffice --headless --convert-to csv a\.xlsx"),
        (".docx", r"pandoc -t plain --wrap=none -o a\.txt a\.docx"),
        (".pdf", r"pdftotext a\.pdf"),
        (".db", r"sqlite3 -csv -header a\.db"),
    ):
        yield _case("new", f"a{suffix}", b"x", f"not read {suffix} files", f"convert it: .*{hint}")
    for suffix in (".pkl", ".pt", ".npy"):
        yield _case("new", f"a{suffix}", b"x", r"can run code or hold no", "write the rows as JSON")
    yield _case("new", "a.log", ROW, r"unknown kind of file '\.log'", "rename it to one of .jsonl")


CASES = [*_text_cases(), *_json_cases(), *_table_cases(), *_packed_cases()]
