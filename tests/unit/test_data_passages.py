"""Passages that are looked for in prepared rows, and what is found out of the rows before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mule.data import audit, passages
from mule.data.audit import data_facts, label_facts, order_correlation
from mule.data.loader import Loader
from mule.data.passages import Passages, copied_stretches, run_hashes
from mule.data.prepare import RowSettings, prepare
from mule.data.shards import Shards
from mule.data.sources.options import ReadOptions
from mule.tokenizer import Tokenizer


def _draw(seed: int, count: int, words: int = 500) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, 0])).integers(0, words, count)


# ---------------------------------------------------------------- passages


@pytest.mark.parametrize("count", [0, 1, 5, 15, 16, 17, 40])
def test_there_is_a_hash_for_each_run_of_16_tokens(count: int) -> None:
    tokens = _draw(1, count).astype(np.uint16)
    assert len(run_hashes(tokens)) == max(0, count - 15)


def test_equal_runs_have_equal_hashes_and_others_do_not() -> None:
    tokens = _draw(1, 3000, words=4)
    hashes = run_hashes(tokens)
    runs = [tuple(tokens[start : start + 16].tolist()) for start in range(len(hashes))]
    assert len(set(hashes.tolist())) == len(set(runs))
    assert np.array_equal(run_hashes(tokens[100:].astype(np.uint32)), hashes[100:])


def test_copies_are_items_half_of_whose_own_runs_stand_there() -> None:
    prompt = _draw(9, 30)
    items = [np.concatenate([prompt, _draw(number, 40)]) for number in range(10, 40)]
    edited = items[3].copy()
    edited[60] = 501
    found = Passages([*items, edited, items[5][:18]])
    found.look_in(np.concatenate([*items[:3], items[3], *items[6:9]]))
    assert found.copies(range(10), least_seen=1) == (10, 7)  # the prompt is everybody's
    assert found.copies(range(30, 31), least_seen=1) == (1, 1)  # one word was changed
    assert found.copies(range(31, 32), least_seen=1) == (0, 0)  # too short to tell
    assert found.copies(range(10), least_seen=2).num_copies == 0


def test_no_items_are_no_copies() -> None:
    found = Passages([])
    found.look_in(_draw(1, 100))
    assert found.copies(range(0), least_seen=1) == (0, 0)
    assert Passages([_draw(1, 3)]).copies(range(1), least_seen=1) == (0, 0)


# ---------------------------------------------------------------- prepared rows


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([_words(seed, 60) for seed in range(80)], 400)


def _words(seed: int, count: int) -> str:
    return " ".join(f"{'bcdfgkmprt'[n % 10]}{n % 37}" for n in _draw(seed, count, 9999).tolist())


def _chat(seed: int, length: int = 40) -> dict[str, Any]:
    asked, answered = _words(seed, 6), _words(1000 + seed, length)
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    }


def _prepared(
    folder: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]], **more: Any
) -> Shards:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = "messages" if "messages" in rows[0] else "text_rows"
    settings = RowSettings(ReadOptions.make(kind), 192, **more)
    return prepare([file], tokenizer, settings, out_dir=folder, valid=folder.name == "valid")


def test_blocks_and_stretches_have_every_run_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = _prepared(tmp_path / "a", tokenizer, [_chat(seed) for seed in range(60)])
    monkeypatch.setattr(passages, "_BLOCK_TOKENS", 100)
    tokens = shards.parts[0].tokens
    blocks = list(passages.stretches(shards))
    assert len(blocks) > 10
    assert np.array_equal(np.concatenate([run_hashes(b) for b in blocks]), run_hashes(tokens))
    some = list(passages.stretches(shards, max_tokens=len(tokens) // 4))
    assert sum(map(len, some)) <= len(tokens) // 4 and len(some) == 64


def test_leaks_and_duplicates_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chats = [_chat(seed) for seed in range(60)]
    edited = json.loads(json.dumps(chats[1]))
    edited["messages"][1]["content"] += " and one more"
    train = _prepared(tmp_path / "train", tokenizer, [*chats[:40], *chats[:10]])
    valid = _prepared(tmp_path / "valid", tokenizer, [chats[0], edited, *chats[40:]])
    facts = data_facts(Loader(train, 4, seed=1), valid, num_steps=20)
    assert facts["kind"] == "chat" and facts["num_items"] == 50
    assert facts["repeated_share"] == pytest.approx(0.2)
    assert facts["nearly_repeated_share"] == pytest.approx(0.4)  # both of a pair have a twin
    assert (facts["num_valid_items"], facts["valid_repeated"]) == (22, 1)
    assert (facts["num_judged_valid_items"], facts["valid_nearly_repeated"]) == (22, 2)
    assert facts["scanned_share"] == 1.0
    assert facts["num_epochs"] == pytest.approx(20 * 4 / train.num_rows)
    alone = data_facts(Loader(train, 4, seed=1), None, num_steps=20)
    assert "num_valid_items" not in alone


def test_different_items_are_neither(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = _prepared(tmp_path / "train", tokenizer, [_chat(seed) for seed in range(40)])
    valid = _prepared(tmp_path / "valid", tokenizer, [_chat(seed) for seed in range(40, 60)])
    facts = data_facts(Loader(train, 4, seed=1), valid, num_steps=20)
    assert facts["repeated_share"] == facts["nearly_repeated_share"] == 0
    assert facts["valid_repeated"] == facts["valid_nearly_repeated"] == 0


def test_the_order_of_the_rows(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = _prepared(tmp_path / "a", tokenizer, [_chat(seed) for seed in range(160)])
    found = [order_correlation(Loader(shards, 2, seed)) for seed in range(8)]
    assert all(value is not None and abs(value) < 0.5 for value in found)
    assert order_correlation(Loader(shards, shards.num_rows + 1, 0)) is None
    monkeypatch.setattr(Loader, "_order", lambda self, epoch: np.arange(self.num_rows))
    assert order_correlation(Loader(shards, 2, 0)) == pytest.approx(1.0, abs=1e-3)


def test_labels_are_those_that_the_trainer_gets(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = _prepared(tmp_path / "a", tokenizer, [_chat(seed, 30) for seed in range(60)])
    facts = label_facts(Loader(shards, 4, 0), tokenizer, num_steps=30)
    assert facts["stopped_answers_share"] == 1.0 and facts["empty_rows_share"] == 0
    assert facts["num_answers"] >= 20 and 0.5 < facts["trained_share"] < 1
    assert 30 < facts["answer_tokens_median"] < 200
    assert 2 < facts["target_entropy"] < np.log(tokenizer.vocab_size)
    for part in shards.parts:
        assert part.trained is not None
        untrained = np.where(np.isin(part.tokens, tokenizer.stop_ids), 0, part.trained)
        object.__setattr__(part, "trained", untrained)
    facts = label_facts(Loader(shards, 4, 0), tokenizer, num_steps=30)
    assert facts["stopped_answers_share"] == 0.0
    monkeypatch.setattr(audit, "_MAX_ROWS", 5)
    assert label_facts(Loader(shards, 4, 0), tokenizer, num_steps=30)["num_sampled_rows"] <= 5


def test_documents_end_and_are_trained_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": _words(seed, 60)} for seed in range(80)]
    shards = _prepared(tmp_path / "a", tokenizer, rows)
    facts = label_facts(Loader(shards, 4, 0), tokenizer, num_steps=40)
    assert facts["trained_share"] == 1.0 and facts["document_ends"] > 20


def test_answers_that_stand_in_the_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chats = [_chat(seed) for seed in range(30)]
    shards = _prepared(tmp_path / "a", tokenizer, [*chats, chats[4]])
    said = chats[4]["messages"][1]["content"]
    recited = np.array(tokenizer.encode(said))[:40]
    own = np.array(tokenizer.encode(_words(77, 40)))[:40]
    mixed = np.concatenate([own[:20], recited[10:34], own[20:]])
    found = copied_stretches(shards, [recited, own, mixed, np.array([]), recited[:10]])
    assert found[0] == (40, 2) and found[1] == (0, 0) and found[3] == found[4] == (0, 0)
    assert found[2][0] in range(24, 27) and found[2][1] == 2
