"""Which format a file has, the columns mapped by hand, and what is said when neither fits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mule import progress
from mule.config import schema
from mule.data.sources import (
    CHAT_FORMATS,
    FORMATS,
    PREFERENCE_FORMATS,
    Conversation,
    Document,
    Item,
    Notice,
    ReadOptions,
    detect,
    read,
    scan,
)
from mule.data.sources.detect import TEXT_FORMATS, Detector
from mule.data.sources.row import Row
from mule.errors import DataError, UserError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def _write(folder: Path, *rows: dict[str, Any], name: str = "a.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_recipe_knows_the_same_formats() -> None:
    named = get_args(schema.DataSection.model_fields["format"].annotation)
    assert named == ("auto", *FORMATS)
    assert schema.CHAT_FORMATS == CHAT_FORMATS
    assert schema.TEXT_FORMATS == TEXT_FORMATS
    assert PREFERENCE_FORMATS == ("preference",)


@pytest.mark.parametrize(
    ("keys", "format"),
    [
        ("messages tools id", "messages"),
        ("conversations system tools", "sharegpt"),
        ("instruction input output", "alpaca"),
        ("instruction input response history", "alpaca"),
        ("instruction context response category", "dolly"),
        ("instruction response category", "dolly"),
        ("question answer", "gsm8k"),
        ("prompt completion", "pairs"),
        ("prompt response score", "pairs"),
        ("message_id parent_id text role rank deleted", "oasst"),
        ("message_tree_id tree_state prompt", "oasst"),
        ("text code test_list task_id", "mbpp"),
        ("task_id prompt canonical_solution test entry_point", "humaneval"),
        ("prompt chosen rejected", "preference"),
        ("conversations chosen rejected", "preference"),
        ("instruction input output chosen rejected", "preference"),
        ("messages label", "preference"),
        ("prompt completion label", "preference"),
        ("text id url dump language language_score", "text_rows"),
    ],
)
def test_the_keys_of_a_row_tell_its_format(keys: str, format: str) -> None:
    row = Row(dict.fromkeys(keys.split(), "x"), "f", 1)
    assert Detector(ReadOptions()).format_of(row).name == format
    assert Detector(ReadOptions(format)).format_of(row).name == format


@given(st.sampled_from([f for f in FORMATS.values() if f.keys]), st.data())
def test_a_format_is_found_by_its_own_keys_with_any_nulls_and_facts(
    known: Any, data: st.DataObject
) -> None:
    needed = data.draw(st.sampled_from(known.keys))
    fresh = st.lists(st.from_regex("[x-z]{3}", fullmatch=True), max_size=2)
    nulls = data.draw(st.lists(st.sampled_from(["chosen", "label", "code", "messages"])))
    value = dict.fromkeys([*nulls, *data.draw(fresh)])
    value |= dict.fromkeys([*needed, *data.draw(fresh)], "x")
    assert Detector(ReadOptions()).format_of(Row(value, "f", 1)).name == known.name


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ("q a", "no known format has the keys q, a; nearest is pairs (prompt, completion)",
         "name the columns, as in data.columns.prompt=q data.columns.completion=a"),
        ("body", "nearest is text_rows (text)", "data.columns.text=body"),
        ("instruction reply", "nearest is alpaca (instruction, output)",
         "data.columns.output=reply"),
        ("prompt", "nearest is pairs (prompt, completion)", 'add "completion" to the row'),
        ("messages text", "fit several formats: messages, text_rows",
         "data.format=messages or data.format=text_rows"),
        ("text code test_list label", 'the format mbpp does not read "label"',
         "set data.format=mbpp to leave it out"),
        ("text code", 'the format text_rows does not read "code"', "data.format=text_rows to leave"),
        ("question answer context", 'the format gsm8k does not read "context"',
         "data.columns.input=context"),
    ],
)  # fmt: skip
def test_keys_that_tell_no_format(tmp_path: Path, keys: str, message: str, hint: str) -> None:
    file = _write(tmp_path, dict.fromkeys(keys.split(), "x"))
    for reading in (lambda: list(read([file])), lambda: detect(file)):
        with pytest.raises(DataError) as caught:
            reading()
        assert str(caught.value).startswith(f"{file}:1: ")
        assert message in caught.value.what and hint in caught.value.hint


def test_a_named_format_settles_what_the_keys_leave_open(tmp_path: Path) -> None:
    file = _write(tmp_path, {"messages": CHAT, "text": "t", "label": 3})
    assert isinstance(next(read([file], ReadOptions("messages"))), Conversation)
    assert isinstance(next(read([file], ReadOptions("text_rows"))), Document)
    message = r'a.jsonl:1: no "question" in this row \(found: messages, text, label\), which gsm8k'
    with pytest.raises(DataError, match=message):
        list(read([file], ReadOptions("gsm8k")))


def test_rows_of_two_formats(tmp_path: Path) -> None:
    file = _write(tmp_path, {"text": "a"}, {"messages": CHAT}, {"text": "b"})
    training = read([file])
    assert isinstance(next(training), Document)
    message = r"a.jsonl:2: a row of the format messages, where line 1 is text_rows"
    with pytest.raises(DataError, match=message):
        next(training)
    with pytest.raises(DataError, match=message):
        detect(file)
    assert detect(file, max_rows=1) == "text_rows"
    found = list(scan(file))
    assert [type(item) for item in found] == [Document, Conversation, Document, DataError]
    assert isinstance(found[-1], DataError) and found[-1].what == (
        "rows of several formats: text_rows (2 rows, the first at line 1), "
        "messages (1 rows, the first at line 2)"
    )


def test_a_check_goes_on_behind_bad_rows(tmp_path: Path) -> None:
    file = _write(tmp_path, {"text": 3}, {"ask": 1}, {"text": "b", "id": 7, "url": "u"})
    file.write_text(file.read_text() + "{\n")
    found = list(scan(file))
    kinds = [type(item) for item in found]
    assert kinds == [DataError, DataError, Document, DataError, Notice]
    assert [e.line for e in found if isinstance(e, DataError)] == [1, 2, 4]
    assert found[-1] == Notice(str(file), None, "not used: id, url")
    assert str(found[-1]) == f"{file}: not used: id, url"


# ---------------------------------------------------------------- columns


def test_columns(tmp_path: Path) -> None:
    row = {"q": "Why?", "output": "swapped", "instruction": "So.", "ctx": None}
    file = _write(tmp_path, row, {**row, "ctx": "c"})
    options = ReadOptions.make(
        columns={"instruction": "output", "output": "instruction", "input": "ctx"}
    )
    assert detect(file, options) == "alpaca"
    found = [
        [m.content for m in c.messages]
        for c in read([file], options)
        if isinstance(c, Conversation)
    ]
    assert found == [["swapped", "So."], ["swapped\n\nc", "So."]]


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    file = _write(tmp_path, {"question": "a", "reply": "b"})
    options = ReadOptions.make(columns={"instruction": "questoin", "output": "reply"})
    with pytest.raises(DataError) as caught:
        list(read([file], options))
    assert caught.value.line == 1
    assert caught.value.hint == (
        'data.columns.instruction=questoin, but there is no "questoin"; did you mean question?'
    )
    whole = _write(tmp_path, {"instruction": "a", "output": "b", "extra": "c"}, name="b.jsonl")
    with pytest.raises(DataError, match=r'columns\.input=exta, but no row has "exta"') as caught:
        list(read([whole], ReadOptions.make(columns={"input": "exta"})))
    assert caught.value.hint == "did you mean extra?"
    with pytest.raises(DataError, match="hint: it has: instruction, output, extra"):
        list(read([whole], ReadOptions.make(columns={"input": "zzz"})))


def test_a_field_that_no_format_has(tmp_path: Path) -> None:
    file = _write(tmp_path, {"text": "a"})
    with pytest.raises(
        UserError, match=r"data.columns.instructoin: no format(.|\n)*s.instruction\?"
    ):
        list(read([file], ReadOptions.make(columns={"instructoin": "text"})))
    with pytest.raises(UserError, match=r"(.|\n)*use one of answer, canonical_solution"):
        detect(file, ReadOptions.make(columns={"zzzz": "text"}))


def test_of_parquet_only_known_columns_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    from mule.data.sources import reading

    rows = [{"body": f"t{n}", "url": "u", "dump": "d"} for n in range(3)]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    seen: list[set[str]] = []
    scan_rows = reading.scan_rows

    def spy(*given: Any) -> Any:
        for row in scan_rows(*given):
            seen.append(set(row.value) if isinstance(row, Row) else set())
            yield row

    monkeypatch.setattr(reading, "scan_rows", spy)
    found = list(scan(file, ReadOptions.make(columns={"text": "body"})))
    assert [d.text for d in found if isinstance(d, Document)] == ["t0", "t1", "t2"]
    assert found[-1] == Notice(str(file), None, "not used: url, dump")
    assert seen == [{"body", "url", "dump"}, {"body"}, {"body"}, {"body"}]
    with pytest.raises(DataError, match="no known format has the keys body, url, dump"):
        list(read([file]))


def test_what_is_lost_in_training_is_told(tmp_path: Path) -> None:
    tree = {"message_id": "1", "text": "a", "role": "prompter"}
    reply = {"message_id": "2", "parent_id": "1", "text": "b", "role": "assistant"}
    gone = {"message_id": "3", "parent_id": "9", "text": "c", "role": "assistant", "lang": "en"}
    told: list[tuple[str, str]] = []

    class Ear(progress.Silence):
        def note(self, text: str, level: str) -> None:
            told.append((text, level))

    file = _write(tmp_path, tree, reply, gone)
    with progress.using(Ear()):
        assert len(list(read([file]))) == 1
    text = "1 messages left out: they hang on 1 parents that are not in the file"
    assert told == [(f"{file}:3: {text}", "warning")]


def test_bytes_are_counted(tmp_path: Path) -> None:
    rows, text = _write(tmp_path, *[{"text": "x" * 50}] * 40), tmp_path / "a.txt"
    text.write_text("some words\n" * 100)
    for file in (rows, text):
        counted: list[int] = []
        assert list(read([file], on_bytes=counted.append))
        assert sum(counted) == file.stat().st_size


# ---------------------------------------------------------------- published files

_PUBLISHED = {
    "alpaca/alpaca_data_cleaned_first500.json": ("alpaca", 500),
    "alpaca/alpaca_en_demo.json": ("alpaca", 899),
    "alpaca/identity.json": ("alpaca", 91),
    "alpaca/instruction-data.json": ("alpaca", 1100),
    "c4/c4_demo.jsonl": ("text_rows", 300),
    "code/HumanEval.jsonl.gz": ("humaneval", 164),
    "code/codegen-instruct.json": ("alpaca", 4535),
    "code/mbpp.jsonl": ("mbpp", 974),
    "dolly/databricks-dolly-3k.jsonl": ("dolly", 2996),
    "gsm8k/main/train-00000-of-00001.parquet": ("gsm8k", 7473),
    "gsm8k/test.jsonl": ("gsm8k", 1000),
    "gsm8k/train.jsonl": ("gsm8k", 7473),
    "hawaiian-pizza/train.jsonl": ("messages", 320),
    "hawaiian-pizza/valid.jsonl": ("messages", 80),
    "mlx-prompt-completion/train.jsonl": ("pairs", 1800),
    "mlx-prompt-completion/valid.jsonl": ("pairs", 144),
    "mlx-wikisql/test.jsonl": ("text_rows", 100),
    "mlx-wikisql/train.jsonl": ("text_rows", 1000),
    "mlx-wikisql/valid.jsonl": ("text_rows", 100),
    "oasst/en_100_tree.jsonl": ("oasst", 100),
    "oasst/oasst1-en-validation.messages.jsonl": ("oasst", 188),
    "preference/dpo_en_demo.json": ("preference", 300),
    "preference/instruction-data-with-preference.json": ("preference", 1100),
    "preference/kto_en_demo.json": ("preference", 300),
    "roleplay/roleplay-simple-deduped-roleplay-instruct.json": ("alpaca", 1923),
    "sharegpt/dummy_conversation.json": ("sharegpt", 500),
    "sharegpt/glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "sharegpt/oasst1-en-validation-sharegpt.json": ("sharegpt", 911),
    "tiny-shakespeare/input.txt": ("text", 1),
    "tinystories/TinyStories-1000.txt": ("text", 1000),
    "wikitext/wiki_demo.txt": ("text", 1),
    "wikitext/wikitext-103/wiki.valid.tokens": ("wikitext", 60),
    "wikitext/wikitext-2/valid.txt": ("wikitext", 60),
}


def _published() -> list[str]:
    """Every data file there is, so that a new one must be named above."""
    files = (file for file in SHARED.rglob("*") if file.is_file())
    names = (str(file.relative_to(SHARED)) for file in files)
    return sorted(n for n in names if not re.search(r"LICENSE|SHA256SUMS|\.md$|README", n))


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="needs the development data")
@pytest.mark.parametrize("name", _published())
def test_every_published_file(name: str) -> None:
    format, count = ("text", 1) if name.startswith("books-") else _PUBLISHED[name]
    file = SHARED / name
    assert detect(file) == format
    found = list(scan(file))
    assert not [error for error in found if isinstance(error, DataError)]
    items = [item for item in found if isinstance(item, Item)]
    assert len(items) == count
    if FORMATS[format].refuse is None:
        assert list(read([file])) == items
