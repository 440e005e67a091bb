"""The texts and chats of the fault bench: those of the demo, and those of `shared/data` where it is.

Names are of data sets, not of files: a part of the bench (development, held-out) has its own.
"""

from __future__ import annotations

import functools
import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule.data import sources
from mule.data.atlas import Sizes, generate

Row = dict[str, Any]  # {"text": ...} or {"messages": [...]}

MAX_CHARS = 360  # of a chat: it must fit into a row of 128 tokens, at the vocabularies here
_DOCUMENT_CHARS = 1200
_LINE_END = re.compile(r"\n|(?<=\. )(?=[A-Z])")  # articles have a line each: sentences, too
_ATLAS_SEED = 11

TEXTS = {  # files below the folder of the data
    "shakespeare": ("tiny-shakespeare/input.txt",),
    "novels": ("books-en/Doyle_Lost_1912.txt", "books-en/Kipling_Captains_1896.txt"),
    "stories": ("tinystories/TinyStories-1000.txt",),
    "romans": ("books-fr/FRA00501_Balzac.txt", "books-fr/FRA01701_GautierT.txt"),
    "wiki": ("wikitext/wiki_demo.txt",),
    "web": ("c4/c4_demo.jsonl",),
}
CHATS = {
    "alpaca": ("alpaca/alpaca_en_demo.json",),
    "dolly": ("dolly/databricks-dolly-3k.jsonl",),
    "gsm8k": ("gsm8k/train.jsonl",),
    "instructions": ("alpaca/instruction-data.json",),
    "pairs": ("mlx-prompt-completion/train.jsonl",),
}
ATLAS_TEXT, ATLAS_CHATS = "atlas", "atlas chats"  # made by Mule, so that they are always there


@dataclass(frozen=True)
class Folder:
    """The folder of the data; what is not in it is skipped."""

    path: Path

    def has(self, name: str) -> bool:
        """Whether a data set can be read here."""
        return all((self.path / file).is_file() for file in _files(name))

    def rows(self, name: str, seed: int, count: int) -> list[Row]:
        """`count` rows of a data set, or all; which ones depends on the seed, their order not."""
        known = _rows(self.path, name)
        if count >= len(known):
            return list(known)
        chosen = random.Random(f"{name}:{seed}").sample(range(len(known)), count)
        return [known[place] for place in sorted(chosen)]


def _files(name: str) -> tuple[str, ...]:
    return {**TEXTS, **CHATS, ATLAS_TEXT: (), ATLAS_CHATS: ()}[name]


@functools.cache
def _rows(folder: Path, name: str) -> list[Row]:
    if name in (ATLAS_TEXT, ATLAS_CHATS):
        with tempfile.TemporaryDirectory(prefix="mule-bench-doctor-") as scratch:
            made = generate(_ATLAS_SEED, Path(scratch), 40, Sizes(pretrain_bytes=500_000))
            return _read([made.pretrain] if name == ATLAS_TEXT else [made.sft])
    return _read([folder / file for file in _files(name)])


def _read(files: list[Path]) -> list[Row]:
    """Chats that are short enough, or texts cut at lines into documents of some length."""
    rows, lines, size = [], [], 0
    for item in sources.read(files):
        if isinstance(item, sources.Document):
            for line in _LINE_END.split(item.text):
                lines.append(line)
                size += len(line)
                if size >= _DOCUMENT_CHARS:
                    rows.append({"text": "\n".join(lines)})
                    lines, size = [], 0
        elif sum(len(message.content) for message in item.messages) <= MAX_CHARS:
            rows.append({"messages": item.as_dicts()})
    return rows
