"""Prepared rows and batches: every token in its place, in an order that seed and step decide."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mule import progress
from mule.batch import IGNORE, Batch
from mule.data import prepare as prepare_module
from mule.data.chat import render_example
from mule.data.hold_out import Item, decide_split, sides
from mule.data.loader import Loader, ValidSet
from mule.data.prepare import RowSettings
from mule.data.shards import Shards, open_shards
from mule.data.sources import read
from mule.data.sources.items import Conversation, Document, Message
from mule.data.sources.options import ReadOptions
from mule.errors import DataError, StorageError, UserError
from mule.tokenizer import Tokenizer
from tests.notes import Notes

TOKENIZER = Tokenizer.train(["The capital of France is Paris, of Spain Madrid.\n" * 9], 300)
DOCUMENTS = [f"Document {n} speaks of Paris{' and Spain' * n}.\n" for n in range(7)]


def prepare(
    paths: list[Any], tokenizer: Tokenizer, *, out_dir: Any, valid: bool = False, **settings: Any
) -> Shards:
    settings_ = RowSettings(ReadOptions(), **settings)
    return prepare_module.prepare(paths, tokenizer, settings_, out_dir=out_dir, valid=valid)


def prepare_pair(
    train: list[Any],
    valid: list[Any] | None,
    *,
    valid_share: float,
    seed: int,
    out_dir: Path,
    max_seq_length: int = 211,
) -> tuple[Shards, Shards]:
    settings = RowSettings(ReadOptions(), max_seq_length)
    return prepare_module.prepare_pair(
        train, valid, TOKENIZER, settings, valid_share=valid_share, seed=seed, out_dir=out_dir
    )


def split_held_out(items: list[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    split = decide_split(lambda: items, share, seed)
    parts: tuple[list[Item], list[Item]] = ([], [])
    for side, item in sides(items, split):
        parts[side].append(item)
    return parts


def _text_file(folder: Path, documents: list[str] = DOCUMENTS) -> Path:
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return file


def _chat_file(folder: Path, num_rows: int = 23, name: str = "chat.jsonl") -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"It is {n}{', indeed' * (n % 5)}."},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes." * (1 + n % 3)},
            ]
        }
        for n in range(num_rows)
    ]
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _all_rows(shards: Shards) -> Batch:
    return Loader(shards, 3, seed=1).batch(np.arange(shards.num_rows))


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("valid", [False, True])
def test_documents_become_windows(tmp_path: Path, document_mask: bool, valid: bool) -> None:
    shards = prepare(
        [_text_file(tmp_path)],
        TOKENIZER,
        max_seq_length=19,
        document_mask=document_mask,
        out_dir=tmp_path / "prepared",
        valid=valid,
    )
    ids = [[*TOKENIZER.encode(text), TOKENIZER.document_end_id] for text in DOCUMENTS]
    stream = np.concatenate(ids)
    documents = np.repeat(np.arange(len(ids)), [len(i) for i in ids])
    assert shards.parts[0].tokens.tolist() == stream.tolist()
    full, rest = divmod(len(stream) - 1, 19)
    assert rest > 0
    assert shards.num_rows == full + valid
    batch = _all_rows(shards)
    assert batch.isolated == document_mask
    assert batch.input_ids.shape == (shards.num_rows, 19)
    for row in range(shards.num_rows):
        window = slice(row * 19, min(row * 19 + 19, len(stream) - 1))
        count = window.stop - window.start
        own, following = documents[window], documents[window.start + 1 : window.stop + 1]
        targets = stream[window.start + 1 : window.stop + 1].copy()
        segments, positions = np.ones(count), np.arange(count)
        if document_mask:
            targets[own != following] = IGNORE
            segments = own - own[0] + 1
            positions = np.concatenate([np.arange((own == d).sum()) for d in np.unique(own)])
        pad = [0] * (19 - count)
        assert batch.input_ids[row].tolist() == [*stream[window], *pad]
        assert batch.targets[row].tolist() == [*targets, *([IGNORE] * len(pad))]
        assert batch.segments[row].tolist() == [*segments, *pad]
        assert batch.positions[row].tolist() == [*positions, *pad]
    assert int((batch.targets != IGNORE).sum()) == shards.num_targets


@pytest.mark.parametrize("length", range(7, 31))
def test_targets_are_counted_whatever_the_window(tmp_path: Path, length: int) -> None:
    file = _text_file(tmp_path, DOCUMENTS[::-1])  # short ones last: windows end where they start
    for valid in (False, True):
        shards = prepare(
            [file],
            TOKENIZER,
            max_seq_length=length,
            document_mask=True,
            out_dir=tmp_path / "p",
            valid=valid,
        )
        assert int((_all_rows(shards).targets != IGNORE).sum()) == shards.num_targets


@pytest.mark.parametrize("add_bos", [False, True])
def test_long_documents_are_encoded_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add_bos: bool
) -> None:
    from mule.data import encode as module
    from mule.tokenizer import core

    TOKENIZER.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {"bos_token": "<|im_start|>", "add_bos_token": add_bos}
    file.write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    documents = [text * 9 for text in DOCUMENTS]
    monkeypatch.setattr(core, "_PIECE_CHARS", 50)
    monkeypatch.setattr(module, "_BATCH_CHARS", 120)
    data = _text_file(tmp_path, documents)
    shards = prepare([data], tokenizer, max_seq_length=8, out_dir=tmp_path / "p")
    monkeypatch.undo()
    start = [tokenizer.bos_id] if add_bos else []
    whole = [[*start, *tokenizer.encode(d), tokenizer.document_end_id] for d in documents]
    assert shards.parts[0].tokens.tolist() == [token_id for ids in whole for token_id in ids]
    assert np.diff(shards.parts[0].offsets).tolist() == [len(ids) for ids in whole]


def test_too_little_text_is_refused_and_nothing_written(tmp_path: Path) -> None:
    file = _text_file(tmp_path, ["Paris"])
    message = (
        r"text.jsonl: only \d tokens in all, fewer than one row of 64(.|\n)*max_seq_length to at"
    )
    with pytest.raises(DataError, match=message):
        prepare([file], TOKENIZER, max_seq_length=64, out_dir=tmp_path / "prepared")
    assert list((tmp_path / "prepared").iterdir()) == []
    shards = prepare([file], TOKENIZER, max_seq_length=64, out_dir=tmp_path / "p", valid=True)
    assert shards.num_rows == 1


# ---------------------------------------------------------------- conversations


@pytest.mark.parametrize("packing", [True, False])
def test_conversations_become_isolated_segments(tmp_path: Path, packing: bool) -> None:
    file = _chat_file(tmp_path)
    shards = prepare([file], TOKENIZER, max_seq_length=211, packing=packing, out_dir=tmp_path / "p")
    examples = [render_example(TOKENIZER, c) for c in read([file]) if isinstance(c, Conversation)]
    expected = {
        (tuple(e.ids[:-1]), tuple(np.where(e.trained, e.ids, IGNORE)[1:])) for e in examples
    }
    batch = _all_rows(shards)
    assert batch.isolated
    assert (shards.num_rows == 23) == (not packing)
    found = set()
    for row in range(shards.num_rows):
        segments = batch.segments[row].numpy()
        used = segments > 0
        assert (np.diff(segments[used]) >= 0).all() and not used[used.sum() :].any()
        assert (batch.targets[row].numpy()[~used] == IGNORE).all()
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert batch.positions[row].numpy()[inside].tolist() == list(range(inside.sum()))
            arrays = (batch.input_ids[row].numpy(), batch.targets[row].numpy())
            found.add(tuple(tuple(array[inside].tolist()) for array in arrays))
    assert found == expected
    assert shards.num_examples == 23
    assert int((batch.targets != IGNORE).sum()) == shards.num_targets
    used = int((batch.segments > 0).sum())
    assert shards.fill == pytest.approx(used / batch.segments.numel())


@pytest.mark.parametrize(("too_long", "kept"), [("drop", 9), ("truncate", 23)])
def test_too_long_examples(tmp_path: Path, too_long: str, kept: int) -> None:
    file = _chat_file(tmp_path)
    lengths = [
        len(render_example(TOKENIZER, c).ids) - 1
        for c in read([file])
        if isinstance(c, Conversation)
    ]
    limit = sorted(lengths)[8]
    assert sorted(lengths)[9] > limit
    with progress.using(notes := Notes()):
        shards = prepare(
            [file], TOKENIZER, max_seq_length=limit, too_long=too_long, out_dir=tmp_path / "p"
        )  # pyrefly: ignore
    assert shards.num_examples == kept
    what = {"drop": "left out", "truncate": "cut off"}[too_long]
    assert notes.texts == [
        f"14 of 23 examples are longer than data.max_seq_length={limit} and were {what}"
    ]
    assert shards.index["num_dropped"] + shards.index["num_truncated"] == 14
    assert max(np.diff(shards.parts[0].offsets)) == limit + 1
    assert (_all_rows(shards).targets != IGNORE).any(dim=1).all()
    with pytest.raises(DataError, match=rf"chat.jsonl:\d+: \d+ tokens, more than .*={limit}"):
        prepare([file], TOKENIZER, max_seq_length=limit, too_long="error", out_dir=tmp_path / "q")


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    for too_long in ("drop", "truncate"):
        with pytest.raises(
            DataError, match=r"all 23 examples are longer than data.max_seq_length=3"
        ):
            prepare(
                [_chat_file(tmp_path)],
                TOKENIZER,
                max_seq_length=3,
                too_long=too_long,
                out_dir=tmp_path / "p",
            )


def test_documents_and_conversations_do_not_mix(tmp_path: Path) -> None:
    files = [_text_file(tmp_path), _chat_file(tmp_path)]
    with pytest.raises(
        DataError, match=r"chat.jsonl:1: conversations, while .*text.jsonl holds doc"
    ):
        prepare(files, TOKENIZER, max_seq_length=19, out_dir=tmp_path / "p")


# ---------------------------------------------------------------- the cache


def test_prepared_once_for_the_same_content_and_settings(tmp_path: Path) -> None:
    file, out = _chat_file(tmp_path), tmp_path / "prepared"
    first = prepare([file], TOKENIZER, max_seq_length=211, out_dir=out)
    written = (first.folder / "index.json").stat().st_mtime_ns
    again = prepare([str(file)], TOKENIZER, max_seq_length=211, out_dir=str(out))
    assert again.folder == first.folder
    assert (again.folder / "index.json").stat().st_mtime_ns == written
    other = prepare([file], TOKENIZER, max_seq_length=212, out_dir=out)
    _chat_file(tmp_path, num_rows=24)
    changed = prepare([file], TOKENIZER, max_seq_length=211, out_dir=out)
    assert len({first.folder, other.folder, changed.folder}) == 3
    assert first.index["sources"][0]["file"] == str(file)
    assert first.tokenizer_fingerprint == TOKENIZER.fingerprint()


def test_a_damaged_folder_is_made_again(tmp_path: Path) -> None:
    file, out = _chat_file(tmp_path), tmp_path / "prepared"
    first = prepare([file], TOKENIZER, max_seq_length=211, out_dir=out)
    tokens = first.parts[0].tokens.tolist()
    content = bytearray((first.folder / "tokens.bin").read_bytes())
    content[5] ^= 1
    (first.folder / "tokens.bin").write_bytes(content)
    with progress.using(notes := Notes()):
        again = prepare([file], TOKENIZER, max_seq_length=211, out_dir=out)
    assert again.parts[0].tokens.tolist() == tokens
    assert "prepared data is damaged and is made again" in notes.texts[0]
    assert "tokens.bin: its content differs" in notes.texts[0]


def test_opening_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    shards = prepare([_chat_file(tmp_path)], TOKENIZER, max_seq_length=211, out_dir=tmp_path / "p")
    (shards.folder / "trained.bin").write_bytes(b"1")
    with pytest.raises(StorageError, match=r"trained.bin: 1 bytes where the index says [\d,]+"):
        open_shards(shards.folder)
    (shards.folder / "index.json").write_text('{"version": 99}')
    with pytest.raises(StorageError, match="prepared data of version 99; this Mule reads 2"):
        open_shards(shards.folder)
    with pytest.raises(StorageError, match=r"index.json: no such file"):
        open_shards(tmp_path)


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_token_that_the_tokenizer_has_not(tmp_path: Path, kind: str) -> None:
    """Damage below a running run, whose files were whole when it began."""
    file = _chat_file(tmp_path) if kind == "chat" else tmp_path / "text.txt"
    if kind == "text":
        file.write_text("".join(DOCUMENTS), encoding="utf-8")
    shards = prepare([file], TOKENIZER, max_seq_length=211, out_dir=tmp_path / "prepared")
    Loader(shards, 1, 0).batch(np.arange(1))
    with open(shards.folder / "tokens.bin", "r+b") as tokens:
        tokens.seek(2 * 3)
        tokens.write(b"\xff\xfe")
    told = f"token 3 has the id 65,279, and the tokenizer {TOKENIZER.vocab_size} tokens: .* damaged"
    with pytest.raises(StorageError, match=told) as failed:
        Loader(shards, shards.num_rows, 0).batch(np.arange(shards.num_rows))
    assert "delete the folder: it is made again" in failed.value.hint


# ---------------------------------------------------------------- validation


def test_a_share_is_held_out_by_seed(tmp_path: Path) -> None:
    file, out = _chat_file(tmp_path), tmp_path / "p"

    def pair(seed: int, share: float = 0.2) -> tuple[Shards, Shards]:
        return prepare_pair([file], None, valid_share=share, seed=seed, out_dir=out)

    train, valid = pair(3)
    assert (train.num_examples, valid.num_examples) == (19, 4)
    assert [s.folder for s in pair(3)] == [train.folder, valid.folder]
    assert pair(4)[1].parts[0].tokens.tolist() != valid.parts[0].tokens.tolist()
    for share in (0.0, 0.6):
        with pytest.raises(UserError, match=f"^{share:g} of the data cannot be held out"):
            pair(3, share)


def test_given_and_found_validation_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    _chat_file(tmp_path / "data", 11, "train.jsonl")
    _chat_file(tmp_path / "data", 5, "valid.jsonl")
    given = _chat_file(tmp_path, 7)
    for valid_paths, count in ((None, 5), ([given], 7)):
        with progress.using(notes := Notes()):
            train, valid = prepare_pair(
                [tmp_path / "data"], valid_paths, valid_share=0.1, seed=3, out_dir=tmp_path / "p"
            )
        assert (train.num_examples, valid.num_examples) == (11, count)
        assert notes.texts == [
            f"{count} of {count} validation conversations are in the training data, word for "
            "word: the validation loss will look better than the model is"
        ]


def _conversation(n: int, line: int) -> Conversation:
    return Conversation((Message("user", f"{n}"), Message("assistant", "b")), "a.jsonl", line)


@pytest.mark.parametrize("seed", range(9))
def test_equal_conversations_stay_on_one_side(seed: int) -> None:
    items = [_conversation(n % 10, n) for n in range(30)]
    kept, held = split_held_out(items, 0.25, seed)
    assert len(kept) + len(held) == 30 and 3 <= len(held) <= 7
    assert not {c.messages for c in kept} & {c.messages for c in held}
    assert kept == sorted(kept, key=lambda c: c.line)
    assert (kept, held) == split_held_out(items, 0.25, seed)


def test_one_document_gives_its_tail() -> None:
    text = "".join(f"line {n}\n" for n in range(100))
    (head,), (tail,) = split_held_out([Document(text, "a.txt", 1)], 0.1, seed=5)
    assert isinstance(head, Document) and isinstance(tail, Document)
    assert head.text + tail.text == text
    assert head.text.endswith("\n")
    assert 0.08 <= len(tail.text) / len(text) <= 0.12
    assert tail.line == head.text.count("\n") + 1


@pytest.mark.parametrize("seed", range(9))
def test_a_share_of_the_characters_is_held_out(seed: int) -> None:
    documents = [Document(f"{n} word\n" * (40 + 90 * n), f"{n}.txt", 1) for n in range(9)]
    kept, held = split_held_out(documents, 0.1, seed)
    texts = [[d.text for d in part if isinstance(d, Document)] for part in (kept, held)]
    total = sum(len(d.text) for d in documents)
    assert sum(map(len, texts[0] + texts[1])) == total
    assert 0.04 <= sum(map(len, texts[1])) / total <= 0.12


def test_nothing_to_hold_out_is_refused() -> None:
    for items in ([_conversation(1, 1), _conversation(1, 2)], [Document("word", "a.txt", 1)]):
        with pytest.raises(UserError, match=r"nothing can be held out of \d equal or very short"):
            split_held_out(items, 0.1, seed=5)


# ---------------------------------------------------------------- order


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return prepare(
        [_chat_file(tmp_path)], TOKENIZER, max_seq_length=211, packing=False, out_dir=tmp_path / "p"
    )


@pytest.mark.parametrize("rows_per_update", [1, 5, 23, 60])
def test_every_epoch_holds_every_row_once(shards: Shards, rows_per_update: int) -> None:
    loader = Loader(shards, rows_per_update, seed=11)
    assert loader.num_rows == 23
    order = np.concatenate(
        [loader.rows_for_step(step) for step in range(2 + 70 // rows_per_update)]
    )
    epochs = [order[start : start + 23].tolist() for start in (0, 23, 46)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.epoch_of(23) == rows_per_update


def test_rows_are_a_function_of_seed_and_step(shards: Shards) -> None:
    loader = Loader(shards, 5, seed=11)
    steps = [loader.rows_for_step(step).tolist() for step in range(40)]
    for step in (39, 3, 17, 0):  # any order, any object
        assert loader.rows_for_step(step).tolist() == steps[step]
        assert Loader(shards, 5, seed=11).rows_for_step(step).tolist() == steps[step]
    twice = Loader(shards, 10, seed=11).rows_for_step(7).tolist()
    assert twice == steps[14] + steps[15]  # the batch size only cuts the same order
    assert Loader(shards, 5, seed=12).rows_for_step(0).tolist() != steps[0]


def test_order_is_the_same_on_every_machine(shards: Shards) -> None:
    """A change here would make every saved run resume on other data."""
    rows = Loader(shards, 8, seed=20).rows_for_step(2)
    assert rows.dtype == np.int64
    assert rows.tolist() == [1, 0, 14, 15, 22, 19, 20, 7]


def test_a_row_of_one_chat_is_no_longer_than_the_longest_needs(
    shards: Shards, tmp_path: Path
) -> None:
    longest = max(int(np.diff(part.offsets).max()) for part in shards.parts) - 1
    assert shards.row_length == 64 * math.ceil(longest / 64) == 128
    packed = prepare([_chat_file(tmp_path)], TOKENIZER, max_seq_length=211, out_dir=tmp_path / "q")
    assert packed.row_length == 211


def test_valid_set_has_all_rows_in_one_shape(shards: Shards) -> None:
    valid = ValidSet(shards, micro_batch_rows=5)
    batches = [batch for batch, _ in valid]
    assert len(batches) == len(valid) == 5
    assert {tuple(batch.input_ids.shape) for batch in batches} == {(5, 128)}, (
        "the longest chat, in steps of 64"
    )
    whole = _all_rows(shards)
    rows = np.concatenate([batch.input_ids.numpy() for batch in batches])
    assert rows[:23].tolist() == whole.input_ids.tolist()
    assert not rows[23:].any()
    assert sum(int((b.targets != IGNORE).sum()) for b in batches) == shards.num_targets
    assert (batches[-1].segments[3:] == 0).all()
    some = [batch for batch, _ in ValidSet(shards, micro_batch_rows=5, max_rows=7)]
    assert [batch.input_ids.shape[0] for batch in some] == [5, 5]
    spread = [0, 3, 6, 9, 13, 16, 19]  # row i * 23 // 7: from the first to the last
    found = np.concatenate([batch.input_ids.numpy() for batch in some])
    assert found[:7].tolist() == rows[spread].tolist()
    assert not some[1].segments[2:].any()
