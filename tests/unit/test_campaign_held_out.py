"""What bits are divided by: the bytes and the words of a held-out set."""

from __future__ import annotations

import json
from pathlib import Path

from mule.data.loader import ValidSet
from mule.data.prepare import RowSettings, prepare
from mule.data.sources.options import ReadOptions
from mule.lab.held_out import num_bytes, num_words
from mule.tokenizer import Tokenizer

WIKITEXT = " = A Title = \n\n The café @-@ bar , as <unk> said . \n"


def _tokenizer() -> Tokenizer:
    return Tokenizer.train(["the café bar as said a title " * 5], 300)


def test_of_text_all_bytes_count_and_no_mark_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the café\n<|endoftext|>\nbar said\n")
    settings = RowSettings(ReadOptions("text"), 4)
    shards = prepare([file], _tokenizer(), settings, out_dir=tmp_path, valid=True)
    assert num_bytes(shards, ValidSet(shards, 2), _tokenizer()) == len("the cafébar said".encode())


def test_words_are_those_of_the_files_as_published(tmp_path: Path) -> None:
    file = tmp_path / "wiki.tokens"
    file.write_text(WIKITEXT)
    for wikitext in ("keep", "clean"):
        options = ReadOptions("wikitext", wikitext=wikitext)
        assert num_words([str(file)], options) == len(WIKITEXT.split()) == 13


def test_of_chats_the_trained_tokens_count(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "the bar"}, {"role": "assistant", "content": "café"}]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    settings = RowSettings(ReadOptions("messages"), 64)
    shards = prepare([file], _tokenizer(), settings, out_dir=tmp_path, valid=True)
    found = num_bytes(shards, ValidSet(shards, 2), _tokenizer())
    assert found in (len("café".encode()), len("café\n".encode()))  # the template may end the line
