"""Preparation in one bounded pass: the same bytes whatever the batches, and after any failure."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mule import fsio, locks, progress
from mule.data import encode, produce
from mule.data import prepare as prepare_module
from mule.data.chat import render_examples
from mule.data.hold_out import Item, decide_split, sides
from mule.data.pack import best_fit
from mule.data.prepare import RowSettings, prepare, prepare_pair
from mule.data.shard_writer import ShardWriter
from mule.data.shards import Part, Shards
from mule.data.sources import read
from mule.data.sources.items import Conversation, Document, Message
from mule.data.sources.options import ReadOptions
from mule.errors import DataError, UserError
from mule.tokenizer import Tokenizer
from mule.tokenizer import core as tokenizer_core

TOKENIZER = Tokenizer.train(["The capital of France is Paris, of Spain Madrid.\n" * 9], 300)
LENGTH = 23
WORDS = st.sampled_from(["Paris", " and Spain", " is", "\n", ".", " Madrid of", "  ", " é", "12"])
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=30).map("".join), min_size=1, max_size=12)
FAST = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Notes(progress.Silence):
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tasks: list[tuple[str, float | None, str]] = []

    def note(self, text: str, level: str) -> None:
        self.texts.append(text)

    def start(self, key: int, description: str, total: float | None, unit: str) -> None:
        self.tasks.append((description, total, unit))


def _settings(**chosen: Any) -> RowSettings:
    return RowSettings(ReadOptions(), **{"max_seq_length": LENGTH, **chosen})


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _text_file(folder: Path, texts: list[str]) -> Path:
    return _write_rows(folder / "text.jsonl", [{"text": text} for text in texts])


def _chat_rows(answers: list[str]) -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": "Paris?"}]
    return [{"messages": [*asked, {"role": "assistant", "content": a}]} for a in answers]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def _only(shards: Shards) -> Part:
    (part,) = shards.parts
    return part


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Batches of so many characters or conversations, each noted in the log."""

    def set_to(size: int) -> None:
        monkeypatch.setattr(encode, "_BATCH_CHARS", size)
        monkeypatch.setattr(encode, "_BATCH_CONVERSATIONS", max(1, size // 20))
        monkeypatch.setattr(produce, "_SYNC_CHARS", 1)

    return set_to


# ---------------------------------------------------------------- against simple references


@FAST
@given(texts=TEXTS, batch_chars=st.integers(1, 90), cut_chars=st.integers(1, 40), data=st.data())
def test_documents_in_parts_are_the_whole_documents(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    batch_chars: int,
    cut_chars: int,
    data: st.DataObject,
) -> None:
    """However a document is handed over, cut and batched, its tokens are those of its text."""

    def in_parts(*_: Any) -> Iterator[Item]:
        for text in texts:
            places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=3)))
            bounds = [0, *places, len(text)]
            for start, end in pairwise(bounds):
                yield Document(text[start:end], "a", 1, ends=False)
            yield Document("", "a", 1)

    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_BATCH_CHARS", batch_chars)
        patch.setattr(tokenizer_core, "_PIECE_CHARS", cut_chars)
        patch.setattr(prepare_module, "read", in_parts)
        file = _text_file(folder, texts)
        shards = prepare([file], TOKENIZER, _settings(), out_dir=folder / "p", valid=True)
    whole = [[*TOKENIZER.encode(text), TOKENIZER.document_end_id] for text in texts]
    assert _only(shards).tokens.tolist() == [token for ids in whole for token in ids]
    assert np.diff(_only(shards).offsets).tolist() == [len(ids) for ids in whole]
    assert shards.index["num_items"] == len(texts)


@FAST
@given(
    answers=st.lists(st.text("ab é", min_size=1, max_size=30).filter(str.strip), min_size=1),
    size=st.integers(1, 200),
    packing=st.booleans(),
    too_long=st.sampled_from(["drop", "truncate"]),
)
def test_chats_are_a_simple_loop_over_examples(
    tmp_path_factory: pytest.TempPathFactory,
    answers: list[str],
    size: int,
    packing: bool,
    too_long: encode.TooLong,
) -> None:
    folder = tmp_path_factory.mktemp("chats")
    file = _write_rows(folder / "chat.jsonl", _chat_rows([*answers, "b"]))
    chosen = _settings(max_seq_length=31, packing=packing, too_long=too_long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_BATCH_CHARS", size)
        shards = prepare([file], TOKENIZER, chosen, out_dir=folder / "p")
    conversations = [c for c in read([file]) if isinstance(c, Conversation)]
    expected, lost = [], 0
    for (example,) in render_examples(TOKENIZER, conversations):
        lost += len(example.ids) > 32
        if len(example.ids) <= 32 or (too_long == "truncate" and example.trained[:32].any()):
            expected.append((example.ids[:32].tolist(), example.trained[:32].tolist()))
    part = _only(shards)
    assert part.trained is not None and part.order is not None and part.rows is not None
    bounds = list(pairwise(part.offsets.tolist()))
    found = [
        (part.tokens[a:b].tolist(), part.trained[a:b].astype(bool).tolist()) for a, b in bounds
    ]
    assert found == expected  # in the order of the sources
    assert shards.index["num_dropped"] + shards.index["num_truncated"] == lost
    lengths = [len(ids) - 1 for ids, _ in expected]
    order, starts = best_fit(lengths, 31) if packing else (np.arange(len(lengths)), None)
    assert part.order.tolist() == order.tolist()
    if starts is not None:
        assert part.rows.tolist() == starts.tolist()
    assert shards.num_targets == sum(sum(trained) for _, trained in expected)


def _split_in_memory(items: list[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Holding out with everything in memory: the reference of the two passes."""
    groups: dict[object, list[int]] = {}
    for number, item in enumerate(items):
        content = item.text if isinstance(item, Document) else item.messages
        groups.setdefault(content, []).append(number)
    members = list(groups.values())
    bits = np.random.Philox(key=[seed, 0]).random_raw(len(members))
    order = np.argsort(bits, kind="stable").tolist()
    size_of = [len(i.text) if isinstance(i, Document) else 1 for i in items]
    wanted, held, held_size = share * sum(size_of), [], 0
    while order[1:]:
        size = sum(size_of[number] for number in members[order[0]])
        if held_size + size > wanted:
            break
        held_size += size
        held += members[order.pop(0)]
    following, head, tail = members[order[0]], None, None
    document = items[following[0]]
    if isinstance(document, Document):
        text, missing = document.text, int(wanted - held_size) if held_size < wanted / 2 else 0
        missing = missing if missing < len(text) else len(text) // 2
        place = len(text) - missing
        place = text.rfind("\n", 0, place) + 1 or place
        if missing and text[:place].strip() and text[place:].strip():
            line = document.line + text.count("\n", 0, place)
            head = text[:place]
            tail = replace(document, text=text[place:], line=line)
    elif not held and order[1:]:
        held += members[order[0]]
    kept = [
        replace(item, text=head) if head is not None and number in following else item
        for number, item in enumerate(items)
        if number not in held
    ]
    if not held and tail is None:
        raise UserError("nothing", "")
    return kept, [*(items[n] for n in sorted(held)), *([tail] if tail else [])]


def _joined(parts: list[Item]) -> list[tuple[Any, int]]:
    """The content and first line of each item, its parts put together."""
    found: list[tuple[Any, int]] = []
    goes_on = False
    for part in parts:
        if isinstance(part, Conversation):
            found.append((part.messages, part.line))
            continue
        if goes_on:
            found[-1] = (found[-1][0] + part.text, found[-1][1])
        else:
            found.append((part.text, part.line))
        goes_on = not part.ends
    assert not goes_on
    return found


def _cut_anywhere(document: Document, places: list[int]) -> Iterator[Document]:
    text, line = document.text, document.line
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    for start, end in pairwise(bounds):
        yield replace(
            document, text=text[start:end], line=line + text.count("\n", 0, start), ends=False
        )
    yield replace(document, text="", line=line + text.count("\n"))


@FAST
@given(
    texts=TEXTS.filter(lambda texts: all(text.strip() for text in texts)),
    share=st.floats(0.01, 0.5),
    seed=st.integers(0, 50),
    places=st.lists(st.integers(0, 400), max_size=3),
    as_chats=st.booleans(),
)
def test_holding_out_by_digests_is_holding_out_in_memory(
    texts: list[str], share: float, seed: int, places: list[int], as_chats: bool
) -> None:
    whole: list[Item]
    if as_chats:
        whole = [
            Conversation((Message("user", text), Message("assistant", "b")), "a", n)
            for n, text in enumerate(texts)
        ]
        parts = whole
    else:
        documents = [Document(text, "a", n * 1000) for n, text in enumerate(texts)]
        whole = list(documents)
        parts = [part for document in documents for part in _cut_anywhere(document, places)]
    try:
        expected = _split_in_memory(whole, share, seed)
    except UserError:
        with pytest.raises(UserError, match=r"nothing can be held out of \d+ equal or very short"):
            decide_split(lambda: parts, share, seed)
        return
    split = decide_split(lambda: parts, share, seed)
    found: tuple[list[Item], list[Item]] = ([], [])
    for side, item in sides(parts, split):
        found[side].append(item)
    assert [content for content, _ in _joined(found[0])] == [c for c, _ in _joined(expected[0])]
    assert sorted(_joined(found[1]), key=str) == sorted(_joined(expected[1]), key=str)


def test_a_held_out_share_is_written_in_the_same_pass(
    tmp_path: Path, small_batches: Callable[[int], None]
) -> None:
    small_batches(40)
    file = _text_file(tmp_path, [f"{n} is Paris\n" * (3 + n) for n in range(12)])
    train, valid = prepare_pair(
        [file], None, TOKENIZER, _settings(), valid_share=0.2, seed=4, out_dir=tmp_path / "p"
    )
    items = list(read([file]))
    split = decide_split(lambda: items, 0.2, 4)
    for number, shards in enumerate((train, valid)):
        texts = [i.text for s, i in sides(items, split) if s == number and isinstance(i, Document)]
        ids = [[*TOKENIZER.encode(text), TOKENIZER.document_end_id] for text in texts]
        assert _only(shards).tokens.tolist() == [token for part in ids for token in part]
        windows = (shards.num_tokens - 1) / LENGTH
        assert windows % 1  # the last window is short: dropped in training, kept in validation
        assert shards.num_rows == (int(windows) + number)
    assert not set(_only(train).digests.tolist()) & set(_only(valid).digests.tolist())


# ---------------------------------------------------------------- failures


def _chat_and_text(folder: Path, kind: str) -> Path:
    if kind == "chat":
        answers = [f"{n} is Paris" * (1 + n % 4) for n in range(40)]
        return _write_rows(folder / "chat.jsonl", _chat_rows(answers))
    texts = [f"Document {n} of Paris" * (1 + n % 9) + "\n" for n in range(40)]
    return _text_file(folder, texts)


class Crash(Exception):
    """As sudden as a power cut, for what the program can know."""


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("hold_out", [False, True])
@pytest.mark.parametrize("crash_at", [0, 1, 3, 6])
def test_a_crash_changes_no_byte(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_batches: Callable[[int], None],
    kind: str,
    hold_out: bool,
    crash_at: int,
) -> None:
    small_batches(100)
    file = _chat_and_text(tmp_path, kind)

    def make(out: Path) -> list[Path]:
        chosen = _settings(max_seq_length=64)
        if not hold_out:
            return [prepare([file], TOKENIZER, chosen, out_dir=out).folder]
        both = prepare_pair([file], None, TOKENIZER, chosen, valid_share=0.2, seed=1, out_dir=out)
        return [shards.folder for shards in both]

    expected = [_contents(folder) for folder in make(tmp_path / "undisturbed")]
    append, calls = ShardWriter.append, []

    def crashing(writer: ShardWriter, block: Any) -> None:
        append(writer, block)
        calls.append(1)
        if len(calls) > crash_at:
            raise Crash

    monkeypatch.setattr(ShardWriter, "append", crashing)
    with pytest.raises(Crash):
        make(tmp_path / "p")
    monkeypatch.setattr(ShardWriter, "append", append)
    with progress.using(notes := Notes()):
        found = [_contents(folder) for folder in make(tmp_path / "p")]
    assert found == expected
    assert not list((tmp_path / "p").glob(".*"))
    resumed = any(text.startswith("going on where an earlier prepar") for text in notes.texts)
    skipped = "Skipping what is done" in [description for description, _, _ in notes.tasks]
    assert resumed == skipped == (crash_at >= (2 if hold_out else 1))


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
def test_a_crash_at_the_end_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Between the last line of the log and the commit: nothing is read again."""
    file = _chat_and_text(tmp_path, "chat")
    chosen = _settings(max_seq_length=64)
    expected = _contents(prepare([file], TOKENIZER, chosen, out_dir=tmp_path / "a").folder)

    def crash(*_: Any) -> None:
        raise Crash

    whom = (ShardWriter, "write_index") if name == "index.json" else (fsio, "_replace_folder")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(*whom, crash)
        prepare([file], TOKENIZER, chosen, out_dir=tmp_path / "p")
    monkeypatch.setattr(prepare_module, "read", crash)
    shards = prepare([file], TOKENIZER, chosen, out_dir=tmp_path / "p")
    assert _contents(shards.folder) == expected


def test_what_lies_there_but_is_not_whole_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: Callable[[int], None]
) -> None:
    small_batches(100)
    file = _chat_and_text(tmp_path, "chat")
    chosen = _settings(max_seq_length=64)
    expected = _contents(prepare([file], TOKENIZER, chosen, out_dir=tmp_path / "a").folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(fsio, "_replace_folder", lambda *_: (_ for _ in ()).throw(Crash))
        prepare([file], TOKENIZER, chosen, out_dir=tmp_path / "p")
    (tokens,) = (tmp_path / "p").glob(".partial-*/*/tokens.bin")
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with progress.using(notes := Notes()):
        shards = prepare([file], TOKENIZER, chosen, out_dir=tmp_path / "p")
    assert _contents(shards.folder) == expected
    assert notes.texts == []


def test_bad_data_leaves_nothing_and_the_first_problem_is_told(
    tmp_path: Path, small_batches: Callable[[int], None]
) -> None:
    """An example that does not fit is found while later rows are read already."""
    small_batches(20)
    rows = _chat_rows([*("yes" for _ in range(9)), "Paris " * 99, "yes", "no"])
    file = _write_rows(tmp_path / "chat.jsonl", rows)
    with open(file, "a") as opened:
        opened.write("{broken\n")
    with pytest.raises(DataError, match=r"chat\.jsonl:10: \d+ tokens, more than data.max_seq_l"):
        prepare(
            [file],
            TOKENIZER,
            _settings(max_seq_length=40, too_long="error"),
            out_dir=tmp_path / "p",
        )
    assert list((tmp_path / "p").iterdir()) == []
    with pytest.raises(DataError, match=r"chat\.jsonl:13: "):
        prepare([file], TOKENIZER, _settings(max_seq_length=999), out_dir=tmp_path / "p")
    assert list((tmp_path / "p").iterdir()) == []


def test_a_file_that_changes_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _text_file(tmp_path, ["Paris is of Spain. " * 9])

    def meddled(*given: Any) -> Iterator[Item]:
        yield from read(*given)
        with open(file, "a") as opened:
            opened.write('{"text": "more"}\n')

    monkeypatch.setattr(prepare_module, "read", meddled)
    with pytest.raises(DataError, match=r"text\.jsonl: it changed while it was read") as caught:
        prepare([file], TOKENIZER, _settings(), out_dir=tmp_path / "p")
    assert caught.value.hint.startswith("run the same command again when nothing writes to it")
    assert list((tmp_path / "p").iterdir()) == []


def test_a_file_that_was_only_touched_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _text_file(tmp_path, ["Paris is of Spain. " * 9])

    def touching(*given: Any) -> Iterator[Item]:
        yield from read(*given)
        file.touch()

    monkeypatch.setattr(prepare_module, "read", touching)
    assert prepare([file], TOKENIZER, _settings(), out_dir=tmp_path / "p").num_rows > 0


def test_no_data_at_all_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _text_file(tmp_path, ["Paris"])
    monkeypatch.setattr(prepare_module, "read", lambda *_: iter(()))
    with pytest.raises(UserError, match="the data holds no text, no conversation"):
        prepare([file], TOKENIZER, _settings(), out_dir=tmp_path / "p")


def test_two_at_once_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _chat_and_text(tmp_path, "text")
    waits, passes = threading.Event(), []

    class Waiting(Notes):
        def note(self, text: str, level: str) -> None:
            super().note(text, level)
            waits.set()

    def slow(*given: Any) -> Iterator[Item]:
        passes.append(1)
        for number, item in enumerate(read(*given)):
            if number == 20:
                assert waits.wait(20)
            yield item

    monkeypatch.setattr(prepare_module, "read", slow)
    folders, notes = [], Waiting()

    def second() -> None:
        with progress.using(notes):
            folders.append(prepare([file], TOKENIZER, _settings(), out_dir=tmp_path / "p").folder)

    def first() -> None:
        thread = threading.Thread(target=second)
        with progress.using(FirstBar(thread)):
            folders.append(prepare([file], TOKENIZER, _settings(), out_dir=tmp_path / "p").folder)
        thread.join()

    class FirstBar(progress.Silence):
        """Starts the other one as soon as this one tokenizes."""

        def __init__(self, thread: threading.Thread) -> None:
            self._thread = thread

        def start(self, key: int, description: str, total: float | None, unit: str) -> None:
            if description == "Tokenizing":
                self._thread.start()

    first()
    assert len(folders) == 2 and folders[0] == folders[1]
    assert passes == [1]
    assert notes.texts == ["another process prepares the same data: waiting for it to end"]
    assert [path.name for path in (tmp_path / "p").iterdir()] == [folders[0].name]


def test_bars_count_the_bytes_of_the_files(tmp_path: Path) -> None:
    file = _chat_and_text(tmp_path, "text")
    size = file.stat().st_size
    told: dict[int, float] = {}

    class Bars(Notes):
        def advance(self, key: int, amount: float, fields: dict[str, Any]) -> None:
            told[key] = told.get(key, 0) + amount

    with progress.using(bars := Bars()):
        prepare_pair(
            [file], None, TOKENIZER, _settings(), valid_share=0.1, seed=1, out_dir=tmp_path / "p"
        )
    assert bars.tasks == [
        ("Reading the data files", size, "B"),
        ("Choosing what to hold out", size, "B"),
        ("Tokenizing", size, "B"),
    ]
    sums = list(told.values())
    assert sums[0] == size and sums[-1] == size and len(sums) == 3
    assert size <= sums[1] <= 2 * size  # read again as far as the document that is cut


def test_work_begun_long_ago_is_removed(tmp_path: Path) -> None:
    old, young, held, killed = (tmp_path / fsio.partial_name(f"prepare-{n}") for n in "oyhk")
    for work in (old, young, held, killed):
        work.mkdir()
        (work / "tokens.bin").write_bytes(b"12")
    week_ago = time.time() - prepare_module._STALE_S - 60
    for work in (old, held, killed):
        os.utime(work, (week_ago, week_ago))
    left = killed.with_name(f"{killed.name}.lock")
    left.touch()  # what a killed process leaves is no lock
    notes = Notes()
    with (
        locks.locked(held.with_name(f"{held.name}.lock"), lambda: None),
        progress.using(notes),
    ):
        prepare([_text_file(tmp_path, ["Paris. " * 40])], TOKENIZER, _settings(), out_dir=tmp_path)
        found = [work.exists() for work in (old, young, held, killed, left)]
    assert found == [False, True, True, False, False]
    said = "begun over a week ago and never finished"
    assert sorted(notes.texts) == sorted(f"removed {work}: {said}" for work in (old, killed))
