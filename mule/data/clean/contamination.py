"""Decontamination: training items that hold a passage of an evaluation set.

Source: Brown et al. 2020, Language Models are Few-Shot Learners, appendix C (13 words in a row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mule import progress
from mule.data.clean.compare import TrainingItem, prompt_text, said_parts, said_text
from mule.data.clean.shingles import Shingler, words

PASSAGE_WORDS = 13
_BATCH_ITEMS = 1024
_NONE = -1  # no evaluation item


@dataclass(frozen=True, slots=True)
class Leak:
    """The training item `index` shares the words `shared` with an evaluation item."""

    index: int
    evaluation: TrainingItem
    shared: str


class Evaluation:
    """The passages of evaluation sets, as 64-bit hashes.

    A passage is 13 words in a row of one turn or document, in lower case and without punctuation;
    system prompts are left out. What is shorter is compared whole: a first question with first
    questions and documents, a whole item with whole items. 12 bytes for each word.
    """

    def __init__(self, items: Sequence[TrainingItem]) -> None:
        self._items = items
        self._passages = Shingler(PASSAGE_WORDS)
        hashes: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        with progress.task("Hashing the evaluation sets", total=len(items), unit="items") as bar:
            for start in range(0, len(items), _BATCH_ITEMS):
                batch = items[start : start + _BATCH_ITEMS]
                found, owner = _hashes(self._passages, batch)
                hashes.append(found)
                owners.append((owner + start).astype(np.int32))
                bar.advance(len(batch))
        every = np.concatenate([np.zeros(0, np.uint64), *hashes])
        self._hashes, first = np.unique(every, return_index=True)
        self._owners = np.concatenate([np.zeros(0, np.int32), *owners])[first]

    def leaks(self, items: Sequence[TrainingItem]) -> list[Leak]:
        """The items that share a passage, in order, each with the first one found."""
        found: list[Leak] = []
        with progress.task("Decontaminating", total=len(items), unit="items") as bar:
            for start in range(0, len(items), _BATCH_ITEMS):
                batch = items[start : start + _BATCH_ITEMS]
                for number, owner in self._matches(batch):
                    evaluation = self._items[owner]
                    shared = _shared_words(batch[number], evaluation)
                    found.append(Leak(start + number, evaluation, shared))
                bar.advance(len(batch))
        return found

    def _matches(self, batch: Sequence[TrainingItem]) -> list[tuple[int, int]]:
        """(item of the batch, evaluation item) of each item that shares a passage."""
        hashes, owners = _hashes(self._passages, batch)
        place = np.searchsorted(self._hashes, hashes)
        place[place == self._hashes.size] = 0
        hit = self._hashes[place] == hashes if self._hashes.size else np.zeros(len(hashes), bool)
        numbers, first = np.unique(owners[hit], return_index=True)
        return list(zip(numbers.tolist(), self._owners[place[hit][first]].tolist()))


def _hashes(passages: Shingler, batch: Sequence[TrainingItem]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes to compare of a batch, and the item of the batch that each belongs to."""
    texts: list[str] = []
    owners: list[int] = []
    for number, item in enumerate(batch):
        for text in _compared(item):
            texts.append(text)
            owners.append(number)
    flat, offsets = passages.hashes(texts)
    return flat, np.repeat(np.array(owners, np.int64), np.diff(offsets))


def _compared(item: TrainingItem) -> list[str]:
    """The parts with a whole passage, and the first question and the item if they are shorter."""
    parts = [part for part in said_parts(item) if _is_long(part)]
    question, whole = prompt_text(item), said_text(item)
    if question is not None and not _is_long(question):
        parts.append(question)
    if not _is_long(whole):
        parts.append(whole)
    return [part for part in parts if words(part)]


def _is_long(text: str) -> bool:
    return len(words(text)) >= PASSAGE_WORDS


def _shared_words(item: TrainingItem, evaluation: TrainingItem) -> str:
    """The first passage of `item` that `evaluation` has too."""
    theirs = {passage for part in _compared(evaluation) for passage in _passages_of(part)}
    ours = (passage for part in _compared(item) for passage in _passages_of(part))
    return " ".join(next(passage for passage in ours if passage in theirs))


def _passages_of(text: str) -> list[tuple[str, ...]]:
    found = words(text)
    return list(zip(*(found[shift:] for shift in range(PASSAGE_WORDS)))) or [tuple(found)]
