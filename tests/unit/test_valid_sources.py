"""The validation loss of each source and category: who is labelled what, and what is summed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from mule import fsio, progress
from mule.batch import IGNORE
from mule.commands import plot, runs
from mule.data import encode, produce
from mule.data.labels import OTHER, Label, Labels, files_by_source
from mule.data.loader import ValidSet
from mule.data.mix.output import row_of
from mule.data.prepare import RowSettings, prepare, prepare_pair
from mule.data.scale import merge_parts, prepare_files
from mule.data.shard_writer import ShardWriter
from mule.data.shards import Shards, open_shards
from mule.data.sources import read
from mule.data.sources.items import Conversation, Document
from mule.data.sources.options import ReadOptions
from mule.evaluate.loss import HeldOutLoss, counted, held_out_loss
from mule.run import Run
from mule.tokenizer import Tokenizer
from tests.tiny import TINY, tiny_model

TOKENIZER = Tokenizer.train(["The capital of France is Paris, of Spain Madrid.\n" * 9], 300)
CONFIG = replace(TINY, vocab_size=TOKENIZER.vocab_size)
CATEGORIES = ("open_qa", "summary", "")
ALPACA, DOLLY, GSM8K = Label("alpaca"), Label("dolly"), Label("gsm8k")


def _settings(**chosen: Any) -> RowSettings:
    return RowSettings(ReadOptions(), **{"max_seq_length": 97, **chosen})


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _three_sources(folder: Path, num_rows: int = 17) -> list[Path]:
    """Alpaca, Dolly with categories, GSM8K: the words tell them apart."""
    numbers = range(num_rows)
    return [
        _write_rows(
            folder / "alpaca.jsonl",
            [{"instruction": f"Name {n}.", "output": "Paris" * (1 + n % 3)} for n in numbers],
        ),
        _write_rows(
            folder / "dolly" / "train.jsonl",
            [
                {
                    "instruction": f"Where is {n}?",
                    "context": "",
                    "response": f"In Spain {n}, of Madrid.",
                    "category": CATEGORIES[n % 3],
                }
                for n in numbers
            ],
        ),
        _write_rows(
            folder / "gsm8k.jsonl",
            [
                {"question": f"{n} and {n}?", "answer": f"It is {n + n}.\n#### {2 * n}"}
                for n in numbers
            ],
        ),
    ]


def _texts(folder: Path) -> list[Path]:
    """Three files of documents, each in words of its own; of two, rows name a category."""
    rows = {
        name: [
            {"text": f"{word} {n}." * (1 + n % 4), **({"category": CATEGORIES[n % 3]} if n else {})}
            for n in range(9)
        ]
        for name, word in (("first", "Paris"), ("second", "Madrid"), ("third", "France"))
    }
    return [_write_rows(folder / f"{name}.jsonl", found) for name, found in rows.items()]


def _only(shards: Shards) -> Any:
    (part,) = shards.parts
    return part


def _label_of_each(shards: Shards) -> list[Label]:
    part = _only(shards)
    return [shards.labels[number] for number in part.label_places[part.labels]]


# ---------------------------------------------------------------- which source


def test_a_source_is_what_was_given(tmp_path: Path) -> None:
    files = _three_sources(tmp_path)
    given = [files[0], files[1].parent, files[2]]
    assert list(files_by_source(given).items()) == [
        (files[0], "alpaca"),
        (files[1], "dolly"),
        (files[2], "gsm8k"),
    ]
    assert files_by_source(given[1:2]) == {files[1]: "dolly"}
    again = _write_rows(tmp_path / "b" / "alpaca.jsonl", [{"text": "a"}])
    assert list(files_by_source([files[0], again, files[0]]).values()) == [
        "alpaca",
        "alpaca-alpaca",
    ]


def test_a_pattern_is_called_by_what_its_files_share(tmp_path: Path) -> None:
    names = ("books/Austen.txt", "books/Dickens.txt", "gsm8k/train-01.txt", "gsm8k/train-02.txt")
    names += ("web/c4_part-1.txt", "web/c4_part-2.txt", "web/one.txt")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a\n")
    patterns = ["books/*.txt", "gsm8k/train-*.txt", "web/c4*.txt", "web/o*.txt"]
    found = files_by_source([tmp_path / pattern for pattern in patterns])
    assert list(found.values()) == ["books"] * 2 + ["gsm8k"] * 2 + ["c4_part"] * 2 + ["one"]


def test_of_one_folder_each_file_is_a_source_but_not_each_of_many_pieces(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    for number in range(30):
        _write_rows(folder / f"{number:02}.jsonl", [{"text": "a"}])
    assert list(files_by_source([folder]).values()) == [f"{n:02}" for n in range(30)]
    _write_rows(folder / "30.jsonl", [{"text": "a"}])
    assert set(files_by_source([folder]).values()) == {"corpus"}


def test_beyond_the_limits_labels_are_called_other() -> None:
    labels = Labels({"a.jsonl": "a"})
    assert labels.of(Document("x", "a.jsonl", 1)) == 0
    for number in range(40):
        labels.of(Document("x", "a.jsonl", 1, source=f"source {number}"))
    for number in range(40):
        labels.of(Document("x", "a.jsonl", 1, category=f"category {number}"))
    found = labels.found
    assert found[:3] == [Label("a"), Label("source 0"), Label("source 1")]
    assert [label for label in found if not label.category][-1] == Label(OTHER)
    assert len({label.source for label in found}) == 31
    categories = [label for label in found if label.category]
    assert categories[-1] == Label("a", OTHER) and len(categories) == 31
    assert labels.of(Document("x", "a.jsonl", 1, category="category 3")) == found.index(
        Label("a", "category 3")
    )
    assert labels.of(Document("x", "a.jsonl", 1, source="new", category="new")) == len(found)
    assert labels.found[-1] == Label(OTHER, OTHER)


@pytest.mark.parametrize("name", ["x" * 41, "https://a.b/c", 7, ["dolly"], None, "", "a\nb", " \t"])
def test_what_is_no_short_name_is_no_source(tmp_path: Path, name: Any) -> None:
    rows = [{"text": "Paris", "source": name, "category": "open_qa"}, {"text": "Madrid"}]
    found = list(read([_write_rows(tmp_path / "a.jsonl", rows)]))
    assert [(item.source, item.category) for item in found] == [("", "open_qa"), ("", "")]


def test_a_row_names_its_source_in_every_format(tmp_path: Path) -> None:
    row = {"source": " smol talk ", "category": "chat"}
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    for content in ({"text": "a"}, {"messages": chat}, {"prompt": "?", "completion": "!"}):
        (item,) = read([_write_rows(tmp_path / "a.jsonl", [content | row])])
        assert (item.source, item.category) == ("smol talk", "chat")


def test_other_columns_can_stand_in(tmp_path: Path) -> None:
    rows = [{"text": "a", "topic": "chess", "source": "club"}] * 2
    options = ReadOptions.make(columns={"category": "topic"})
    file = _write_rows(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for item in read([file, tmp_path / "a.parquet"], options):
        assert (item.source, item.category) == ("club", "chess")


def test_a_mix_keeps_categories(tmp_path: Path) -> None:
    files = _three_sources(tmp_path)
    rows = [row_of(item, "mine") for item in read([files[1]])]
    assert [row.get("category", "") for row in rows[:3]] == list(CATEGORIES)
    items = list(read([_write_rows(tmp_path / "mix" / "train.jsonl", rows)]))
    assert {item.source for item in items} == {"mine"}
    assert [item.category for item in items[:3]] == list(CATEGORIES)
    (text,) = read([_write_rows(tmp_path / "t.jsonl", [{"text": "a", "category": "b"}])])
    assert row_of(text, "mine") == {"text": "a", "source": "mine", "category": "b"}


# ---------------------------------------------------------------- prepared


def test_examples_have_the_label_of_their_row(tmp_path: Path) -> None:
    shards = prepare(
        _three_sources(tmp_path), TOKENIZER, _settings(), out_dir=tmp_path / "p", valid=True
    )
    expected = [ALPACA] * 17 + [Label("dolly", CATEGORIES[n % 3]) for n in range(17)] + [GSM8K] * 17
    assert _label_of_each(shards) == expected
    assert shards.index["labels"] == [
        {"source": "alpaca", "category": ""},
        {"source": "dolly", "category": "open_qa"},
        {"source": "dolly", "category": "summary"},
        {"source": "dolly", "category": ""},
        {"source": "gsm8k", "category": ""},
    ]


def test_a_held_out_share_keeps_the_labels_of_its_side(tmp_path: Path) -> None:
    files = _three_sources(tmp_path)
    train, valid = prepare_pair(
        files, None, TOKENIZER, _settings(), valid_share=0.3, seed=2, out_dir=tmp_path / "p"
    )
    part, words = _only(valid), {"Paris": "alpaca", "Spain": "dolly", "It is": "gsm8k"}
    for number, label in enumerate(_label_of_each(valid)):
        text = TOKENIZER.decode(part.tokens[slice(*part.offsets[number : number + 2])].tolist())
        assert [source for word, source in words.items() if word in text] == [label.source], text
    assert {label.source for label in _label_of_each(valid)} == {"alpaca", "dolly", "gsm8k"}
    assert train.labels == [Label("")] and _only(train).labels is None
    assert not (train.folder / "labels.bin").exists()


def test_prepared_rows_without_labels_still_open(tmp_path: Path) -> None:
    shards = prepare(
        _three_sources(tmp_path), TOKENIZER, _settings(), out_dir=tmp_path / "p", valid=True
    )
    del shards.index["labels"]
    fsio.write_json(shards.folder / "index.json", shards.index)
    (shards.folder / "labels.bin").unlink()
    old = ValidSet(open_shards(shards.folder), 4)
    assert old.labels == [Label("")]
    assert not any(labels.any() for _, labels in old)
    loss = held_out_loss(tiny_model(CONFIG), old, 1)
    assert loss.figures(old.labels).keys() == {"val_loss", "val_perplexity"}


def test_renaming_a_source_makes_validation_rows_again_but_no_other_training_rows(
    tmp_path: Path,
) -> None:
    files = _three_sources(tmp_path)

    def pair() -> tuple[Shards, Shards]:
        return prepare_pair(
            files, None, TOKENIZER, _settings(), valid_share=0.3, seed=2, out_dir=tmp_path / "p"
        )

    train, valid = pair()
    files[0] = files[0].rename(tmp_path / "instructions.jsonl")
    train_again, valid_again = pair()
    assert train_again.folder == train.folder  # a resumed run finds its data
    assert valid_again.folder != valid.folder
    assert valid_again.labels[0] == Label("instructions") and valid.labels[0] == ALPACA
    names = ("tokens.bin", "trained.bin", "offsets.bin", "digests.bin", "order.bin", "rows.bin")
    for name in names:
        assert (valid_again.folder / name).read_bytes() == (valid.folder / name).read_bytes()


class Crash(Exception):
    """As sudden as a power cut, for what the program can know."""


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("crash_at", [1, 4, 9])
def test_a_crash_changes_no_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, crash_at: int
) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARS", 100)
    monkeypatch.setattr(encode, "_BATCH_CONVERSATIONS", 3)
    monkeypatch.setattr(produce, "_SYNC_CHARS", 1)
    files = _three_sources(tmp_path) if kind == "chat" else _texts(tmp_path)

    def make(out: str) -> Shards:
        return prepare_pair(
            files, None, TOKENIZER, _settings(), valid_share=0.4, seed=1, out_dir=tmp_path / out
        )[1]

    expected = make("undisturbed")
    append, calls = ShardWriter.append, []

    def crashing(writer: ShardWriter, block: Any) -> None:
        append(writer, block)
        calls.append(1)
        if len(calls) > crash_at:
            raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(ShardWriter, "append", crashing)
        make("p")
    found = make("p")
    assert len(found.labels) > 4
    for name in ("labels.bin", "tokens.bin", "index.json"):
        assert (found.folder / name).read_bytes() == (expected.folder / name).read_bytes(), name


def test_labels_known_at_the_end_survive_a_crash_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = _three_sources(tmp_path)

    def make() -> Shards:
        return prepare(files, TOKENIZER, _settings(), out_dir=tmp_path / "p", valid=True)

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(ShardWriter, "finish_chat", crash)
        make()
    monkeypatch.setattr("mule.data.prepare.read", crash)  # nothing is read a second time
    shards = make()
    assert [label.source for label in shards.labels] == ["alpaca", *["dolly"] * 3, "gsm8k"]


def test_parts_of_several_workers_share_one_list_of_labels(tmp_path: Path) -> None:
    files = _three_sources(tmp_path)
    parts = [
        prepare_files(files, TOKENIZER, _settings(), tmp_path / "out", n, 2, valid=True).folder
        for n in range(2)
    ]
    merged = merge_parts(parts, tmp_path / "out")
    assert merged.labels == [
        *(ALPACA, GSM8K),
        *(Label("dolly", "open_qa"), Label("dolly", "summary"), DOLLY),
    ]
    second = merged.parts[1]
    assert second.labels is not None
    assert second.label_places[second.labels].tolist() == [2 + n % 3 for n in range(17)]


# ---------------------------------------------------------------- rows


def test_the_rows_used_are_spread_over_all_sources(tmp_path: Path) -> None:
    shards = prepare(
        _three_sources(tmp_path),
        TOKENIZER,
        _settings(packing=False),
        out_dir=tmp_path / "p",
        valid=True,
    )
    valid = ValidSet(shards, 2, max_rows=6)
    used = {valid.labels[n].source for _, labels in valid for n in labels.unique().tolist()}
    assert used == {"alpaca", "dolly", "gsm8k"}


def test_every_target_of_a_packed_row_has_the_label_of_its_example(tmp_path: Path) -> None:
    shards = prepare(
        _three_sources(tmp_path), TOKENIZER, _settings(), out_dir=tmp_path / "p", valid=True
    )
    part, mixed = _only(shards), 0
    number = 0
    for batch, labels in ValidSet(shards, 3):
        assert labels.shape == batch.targets.shape
        for segments, found in zip(batch.segments.tolist(), labels.tolist()):
            if number == shards.num_rows:
                assert not any(segments)
                continue
            examples = part.order[part.rows[number] : part.rows[number + 1]]
            expected = [part.labels[examples[s - 1]] if s else 0 for s in segments]
            assert found == expected
            mixed += len({shards.labels[label].source for label in found}) > 1
            number += 1
    assert mixed > 2  # rows in which several sources lie


@pytest.mark.parametrize("document_mask", [False, True])
def test_every_target_of_running_text_has_the_label_of_its_document(
    tmp_path: Path, document_mask: bool
) -> None:
    shards = prepare(
        _texts(tmp_path),
        TOKENIZER,
        _settings(max_seq_length=19, document_mask=document_mask),
        out_dir=tmp_path / "p",
        valid=True,
    )
    part = _only(shards)
    of_token = np.repeat(part.labels, np.diff(part.offsets))
    batches = list(ValidSet(shards, 4))
    targets = np.concatenate([batch.targets.flatten() for batch, _ in batches])
    found = np.concatenate([labels.flatten() for _, labels in batches])
    assert (found[: len(of_token) - 1] == of_token[1:]).all()
    trained = targets != IGNORE
    assert (found[trained] == of_token[1:][trained[: len(of_token) - 1]]).all()
    assert set(found[trained].tolist()) == set(range(len(shards.labels)))


# ---------------------------------------------------------------- sums


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    settings = _settings(max_seq_length=23)
    return prepare(_texts(tmp_path), TOKENIZER, settings, out_dir=tmp_path / "p", valid=True)


def _sum_by_name(shards: Shards, name_of: Callable[[Label], str]) -> dict[str, tuple[float, int]]:
    """Log-likelihoods from the logits, one target after the other."""
    model, sums = tiny_model(CONFIG), {}
    for batch, labels in ValidSet(shards, 3):
        logits = model(batch.input_ids).double()
        nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        for target, label, value in zip(
            batch.targets.flatten().tolist(), labels.flatten().tolist(), nll.tolist()
        ):
            name = name_of(shards.labels[label])
            if target != IGNORE and name:
                before = sums.get(name, (0.0, 0))
                sums[name] = before[0] + value, before[1] + 1
    return sums


def test_sums_by_source_and_category_are_those_of_the_logits(shards: Shards) -> None:
    valid = ValidSet(shards, 3)
    found = held_out_loss(tiny_model(CONFIG), valid, len(valid.labels))
    for parts, expected in (
        (found.by_source(valid.labels), _sum_by_name(shards, lambda label: label.source)),
        (
            found.by_category(valid.labels),
            _sum_by_name(shards, lambda label: label.category and "/".join(label)),
        ),
    ):
        assert list(parts) == sorted(expected) and len(parts) >= 3
        for name, (nll, count) in expected.items():
            assert parts[name].num_targets == count
            assert parts[name].loss == pytest.approx(nll / count, rel=1e-5)
        assert len({round(part.loss, 4) for part in parts.values()}) > 1
    assert found.num_targets == shards.num_targets
    assert found.figures(valid.labels)["val_loss_by"]["second"] == (
        found.by_source(valid.labels)["second"].loss
    )


def test_with_one_label_the_loss_is_that_of_the_batches_bit_for_bit(tmp_path: Path) -> None:
    shards = prepare(
        _texts(tmp_path)[1:2], TOKENIZER, _settings(), out_dir=tmp_path / "p", valid=True
    )
    model, one = tiny_model(CONFIG), [Label("second")]
    batches = [batch for batch, _ in ValidSet(shards, 2)]
    total = torch.zeros(())
    with torch.no_grad():
        for batch in batches:
            total += model.nll_sum(batch)
    valid = ValidSet(replace(shards, parts=[replace(_only(shards), labels=None)], labels=one), 2)
    found = held_out_loss(model, valid, 1)
    assert found.loss == float(total) / found.num_targets
    assert found.by_source(one) == found.by_category(one) == {}


def test_a_bar_moves_while_rows_are_read(shards: Shards) -> None:
    valid, rows = ValidSet(shards, 3), list[float]()

    class Rows(progress.Silence):
        def advance(self, key: int, amount: float, fields: dict[str, Any]) -> None:
            rows.append(amount)

    with progress.using(Rows()), progress.task("Evaluating") as bar:
        held_out_loss(tiny_model(CONFIG), counted(valid, bar), len(valid.labels))
    assert rows == [3.0] * -(-valid.num_rows // 3)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_of_several_processes_add_up(shards: Shards, world_size: int) -> None:
    valid, model = ValidSet(shards, 2, max_rows=7), tiny_model(CONFIG)
    whole = held_out_loss(model, valid, len(valid.labels))
    cuts = [range(start, min(start + 2, 7)) for start in range(0, 7, 2)] + [range(7, 7)]
    parts = [
        held_out_loss(model, valid.batches(cuts[rank::world_size]), len(valid.labels))
        for rank in range(world_size)
    ]
    assert [sum(counts) for counts in zip(*(part.counts for part in parts))] == whole.counts
    nll = [sum(values) for values in zip(*(part.nll for part in parts))]
    assert nll == pytest.approx(whole.nll, rel=1e-5)
    assert HeldOutLoss(nll, whole.counts).loss == pytest.approx(whole.loss, abs=1e-6)


def test_a_share_without_rows_has_no_loss(shards: Shards) -> None:
    valid, model = ValidSet(shards, 2), tiny_model(CONFIG)
    model.train()
    found = held_out_loss(model, valid.batches([range(3, 3)]), len(valid.labels))
    assert (found.loss, found.num_targets) == (0.0, 0) and model.training
    assert found.by_source(valid.labels) == {}


def test_figures_of_planted_losses() -> None:
    labels = [ALPACA, Label("dolly", "open_qa"), Label("dolly", "summary"), DOLLY, GSM8K]
    found = HeldOutLoss([2.0, 12.0, 3.0, 3.0, 0.0], [4, 3, 1, 2, 0])
    assert found.figures(labels) == {
        "val_loss": 2.0,
        "val_perplexity": math.exp(2.0),
        "val_loss_by": {"alpaca": 0.5, "dolly": 3.0},  # nothing held out of gsm8k
        "val_loss_by_category": {"dolly/open_qa": 4.0, "dolly/summary": 3.0},
    }


# ---------------------------------------------------------------- what is shown


def test_runs_show_says_how_each_source_changed(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "mix", "{}")
    run.start_attempt()
    for step, values in ((1, (4.0, 3.0)), (2, None), (3, (3.0, 3.5))):
        by = {"val_loss_by": dict(zip(("alpaca", "gsm8k"), values))} if values else {}
        run.log_metrics({"step": step, "loss": 1.0, **by})
    run.log_metrics({"step": 4, "loss": 1.0, "val_loss_by": {"gsm8k": 2.0, "new": 1.0}})
    shown = runs.show("mix", tmp_path)
    assert shown["sources"] == [
        {"source": "gsm8k", "first": 3.0, "val_loss": 2.0, "change": -1.0},
        {"source": "new", "first": None, "val_loss": 1.0, "change": None},
    ]
    assert shown["categories"] == []


def test_a_plot_of_one_run_draws_its_sources(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = Run.create(tmp_path, "mix", "")
    run.start_attempt()
    for step in (1, 2, 3):
        by = {"alpaca": 4.0 / step, "gsm8k": 9.0} if step != 2 else {}
        row = {"step": step, "loss": 3.0, "num_targets": 7, "val_loss": 3.5}
        run.log_metrics(row | ({"val_loss_by": by} if by else {}))
    assert plot.curve_of(run, "tokens")["sources"] == {
        "alpaca": [(7, 4.0), (21, pytest.approx(4 / 3))],
        "gsm8k": [(7, 9.0), (21, 9.0)],
    }
    pictures = [plot.run(["mix"] * n, tmp_path / f"{n}.svg", root=tmp_path) for n in (1, 2)]
    one, two = (Path(picture["file"]).read_text() for picture in pictures)
    assert "<!-- gsm8k 9.000 -->" in one and "gsm8k" not in two


def test_no_conversation_is_told_apart_by_where_it_is_from() -> None:
    plain = Conversation((), "a", 1)
    assert replace(plain, source="x", category="y") == plain
