"""Double-encoded text: what is judged to be it, and the repaired copies of files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mule.data.check.encoding import first_repair, repair_text, repair_value
from mule.data.check.repair import repair_files
from mule.errors import DataError, UserError

BROKEN, MEANT = "The cafÃ© is dÃ©jÃ  closed.", "The café is déjà closed."


@pytest.mark.parametrize(
    ("found", "meant"),
    [
        (BROKEN, MEANT),
        ("Le caf√© est ferm√©.", "Le café est fermé."),
        ("Itâ€™s late, he said.", "It’s late, he said."),
        ("â€œBe careful!â€ Annie said.", "“Be careful!” Annie said."),
        ("â€œBe careful!â€", "“Be careful!”"),
        ("Ä°stanbul'da yaÅŸÄ±yor", "İstanbul'da yaşıyor"),
    ],
)
def test_double_encoded_text_is_repaired(found: str, meant: str) -> None:
    assert repair_text(found) == meant
    assert first_repair(found) is not None


@pytest.mark.parametrize(
    "text",
    [
        "du café, l'été, où ça: naïve Ärger – “quoted” …",
        "√16 = 4, 5 °C, ½ × 3, † 1832",
        "Привет, как дела? 你好。こんにちは",
        "<|im_start|> [INST] {{name}} \x07",
        "emoji 👍🏽 and a flag 🇫🇷",
        "",
    ],
)
def test_what_is_right_stays(text: str) -> None:
    assert repair_text(text) == text and first_repair(text) is None


@given(st.text())
def test_lines_that_are_right_stay_beside_broken_ones(text: str) -> None:
    if first_repair(text) is None:
        assert repair_text(f"{text}\n{BROKEN}") == f"{text}\n{MEANT}"


def test_the_place_and_the_words_are_told() -> None:
    assert first_repair(f"one\ntwo\n{BROKEN}\n") == (8, "cafÃ© is -> café is")


def test_values_are_repaired_at_any_depth_and_keys_never() -> None:
    value = {BROKEN: [BROKEN, {"a": (3, None, True)}]}
    assert repair_value(value) == {BROKEN: [MEANT, {"a": (3, None, True)}]}


# ---------------------------------------------------------------- files


def _repair(file: Path, content: bytes) -> tuple[int, bytes]:
    """The number of repaired texts, and the content of the copy."""
    file.write_bytes(content)
    target = file.parent / "fixed" / file.name
    counts = repair_files({file: target})
    assert file.read_bytes() == content
    return counts.get(str(target), 0), target.read_bytes() if target.exists() else b""


def test_json_lines_keep_every_other_byte(tmp_path: Path) -> None:
    whole = b'{"a" :  "caf\\u00e9",\t"n": 1.50, "a": 2}\r\n\r\n'
    broken = json.dumps({"text": BROKEN, "n": [1, None]}).encode() + b"\r\n"
    meant = json.dumps({"text": MEANT, "n": [1, None]}, ensure_ascii=False).encode() + b"\r\n"
    start = b"\xef\xbb\xbf"
    count, copy = _repair(tmp_path / "a.jsonl", start + whole + broken + whole)
    assert (count, copy) == (1, start + whole + meant + whole)


@pytest.mark.parametrize(
    "layout",
    [
        '[{"a": "%s"}, {"a": "b"}]',
        '[\n{"a": "%s"},\n{"a": "b"}\n]\n',
        '[\n  {"a": "%s"},\n  {"a": "b"}\n]\n',
        '[\n  {\n    "a": "%s"\n  },\n  {\n    "a": "b"\n  }\n]',
        '{\n    "a": "%s"\n}\n',
    ],
)
def test_json_keeps_its_layout(tmp_path: Path, layout: str) -> None:
    count, copy = _repair(tmp_path / "a.json", (layout % BROKEN).encode())
    assert (count, copy.decode()) == (1, layout % MEANT)


def test_text_and_csv_keep_their_lines(tmp_path: Path) -> None:
    rows = 'q,a\r\n"Is, it?","{}"\r\nb,c\r\n'
    count, copy = _repair(tmp_path / "a.csv", rows.format(BROKEN).encode())
    assert (count, copy.decode()) == (1, rows.format(MEANT))
    count, copy = _repair(tmp_path / "a.txt", f"one\n{BROKEN}\n{BROKEN}".encode())
    assert (count, copy.decode()) == (2, f"one\n{MEANT}\n{MEANT}")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_stay_packed(tmp_path: Path, suffix: str) -> None:
    rows = json.dumps({"text": BROKEN}) + "\n"
    if suffix == ".gz":
        packed = gzip.compress(rows.encode())
    else:
        packed = pa.compress(rows.encode(), codec="zstd", asbytes=True)
    count, copy = _repair(tmp_path / f"a.jsonl{suffix}", packed)
    name = "gzip" if suffix == ".gz" else "zstd"
    content = pa.CompressedInputStream(pa.BufferReader(copy), name).read()
    assert count == 1 and json.loads(content) == {"text": MEANT}


def test_parquet_keeps_its_schema(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": [BROKEN, "b"],
            "n": pa.array([1, None], pa.int16()),
            "turns": [[{"role": "user", "content": BROKEN}], None],
        }
    )
    file, target = tmp_path / "a.parquet", tmp_path / "fixed" / "a.parquet"
    parquet.write_table(table, file)
    assert repair_files({file: target}) == {str(target): 1}
    copy = parquet.read_table(target)
    assert copy.schema == table.schema
    assert copy.to_pylist() == [
        {"text": MEANT, "n": 1, "turns": [{"role": "user", "content": MEANT}]},
        {"text": "b", "n": None, "turns": None},
    ]


def test_files_without_broken_text_are_copied_as_they_are(tmp_path: Path) -> None:
    whole, broken = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    whole.write_bytes(b'{"text" : "caf\\u00e9"}')
    broken.write_text(json.dumps({"text": BROKEN}), encoding="utf-8")
    targets = {file: tmp_path / "fixed" / file.name for file in (whole, broken)}
    assert repair_files(targets) == {str(targets[broken]): 1}
    assert targets[whole].read_bytes() == whole.read_bytes()


def test_nothing_is_written_where_nothing_is_broken(tmp_path: Path) -> None:
    assert _repair(tmp_path / "a.jsonl", b'{"text": "fine"}\n') == (0, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_copy_never_replaces_an_original(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": BROKEN}), encoding="utf-8")
    with pytest.raises(UserError, match="would replace an original") as caught:
        repair_files({file: file})
    assert caught.value.hint == "give another folder with --out"
    with pytest.raises(UserError, match="2 files would be copied to this place"):
        repair_files({file: tmp_path / "x", tmp_path / "b.jsonl": tmp_path / "x"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "a.jsonl:2: not valid JSON"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "a.jsonl:2: not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_not_guessed(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        _repair(tmp_path / "a.jsonl", content)
    assert message in caught.value.message and caught.value.hint
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["a.jsonl"]
