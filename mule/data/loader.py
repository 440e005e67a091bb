"""Rows in an order that is a function of (seed, step), and rows as batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from mule.batch import IGNORE, Batch
from mule.data.shards import Part, Shards

_MAX_CACHED_EPOCHS = 2  # an update usually crosses at most one epoch's end

# Adds to a batch what is kept of the rows it is made of, given their numbers.
Complete = Callable[[Batch, np.ndarray], Batch]


class Loader:
    """The rows of every update, whatever the micro-batch or the number of ranks."""

    def __init__(self, shards: Shards, rows_per_update: int, seed: int) -> None:
        assert rows_per_update >= 1 and seed >= 0
        self.shards = shards
        self.num_rows = shards.num_rows
        self.rows_per_update = rows_per_update
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}
        self.complete: Complete = lambda batch, rows: batch

    def rows_for_step(self, step: int) -> np.ndarray:
        """Row indices (rows_per_update,) int64 of the update number `step`, counted from 0."""
        first = step * self.rows_per_update
        epochs, places = np.divmod(np.arange(first, first + self.rows_per_update), self.num_rows)
        rows = np.empty(self.rows_per_update, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            rows[chosen] = self._order(epoch)[places[chosen]]
        return rows

    def batch(self, rows: np.ndarray) -> Batch:
        """The given rows as a batch (B, row_length); no rows are one without targets."""
        return self.complete(make_batch(self.shards, rows, num_rows=max(1, len(rows))), rows)

    def epoch_of(self, step: int) -> float:
        """Epochs seen before the update number `step`."""
        return step * self.rows_per_update / self.num_rows

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= _MAX_CACHED_EPOCHS:
                del self._orders[min(self._orders)]
            # Sorted raw bits: numpy keeps those the same in every version, permutations it may not.
            bits = np.random.Philox(key=[self._seed, epoch]).random_raw(self.num_rows)
            self._orders[epoch] = np.argsort(bits, kind="stable")
        return self._orders[epoch]


class Labelled(NamedTuple):
    """A batch, and the number of the label of each of its targets, (B, T) int64."""

    batch: Batch
    labels: torch.Tensor


class ValidSet:
    """At most `max_rows` rows in order, in micro-batches of one shape (the last padded).

    Fewer rows than there are lie evenly over all of them: rows are in the order of the sources, or
    of length, and the first ones would be of one source, or the longest.
    """

    def __init__(self, shards: Shards, micro_batch_rows: int, max_rows: int | None = None) -> None:
        self.shards, self.micro_batch_rows = shards, micro_batch_rows
        self.labels = shards.labels
        self.num_rows = min(shards.num_rows, max_rows or shards.num_rows)
        self._rows = np.arange(self.num_rows) * shards.num_rows // self.num_rows
        self.complete: Complete = lambda batch, rows: batch

    def __len__(self) -> int:
        return -(-self.num_rows // self.micro_batch_rows)

    def __iter__(self) -> Iterator[Labelled]:
        starts = range(0, self.num_rows, self.micro_batch_rows)
        return self.batches(range(i, min(i + self.micro_batch_rows, self.num_rows)) for i in starts)

    def batches(self, cuts: Iterable[range]) -> Iterator[Labelled]:
        """A batch of each range of at most `micro_batch_rows` rows, which may be empty."""
        for cut in cuts:
            rows = self._rows[cut.start : cut.stop]
            batch = make_batch(self.shards, rows, num_rows=self.micro_batch_rows)
            yield Labelled(self.complete(batch, rows), self._labels_of(rows))

    def _labels_of(self, rows: np.ndarray) -> torch.Tensor:
        """Zero where no target is, and where no labels were recorded."""
        labels = np.zeros((self.micro_batch_rows, self.shards.row_length), dtype=np.int64)
        for out, row in zip(labels, rows.tolist()):
            part, number = self.shards.locate(row)
            if part.labels is not None:
                examples = _examples_of_targets(part, number, len(out))
                out[: len(examples)] = part.label_places[part.labels[examples]]
        return torch.from_numpy(labels)


def make_batch(shards: Shards, rows: np.ndarray, num_rows: int | None = None) -> Batch:
    """The given rows as a batch, with empty rows added up to `num_rows`."""
    shape = (num_rows or len(rows), shards.row_length)
    arrays = {
        "input_ids": np.zeros(shape, dtype=np.int64),
        "targets": np.full(shape, IGNORE, dtype=np.int64),
        "positions": np.zeros(shape, dtype=np.int64),
        "segments": np.zeros(shape, dtype=np.int64),
    }
    for place, row in enumerate(rows.tolist()):
        part, number = shards.locate(row)
        out = {name: array[place] for name, array in arrays.items()}
        if shards.kind == "chat":
            _fill_chat_row(part, number, out)
        else:
            _fill_text_row(part, number, out, isolated=shards.isolated)
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(**tensors, isolated=shards.isolated)


def _examples_of_targets(part: Part, row: int, row_length: int) -> np.ndarray:
    """The number of the example or document of each target of a row, (at most row_length,)."""
    if part.rows is None or part.order is None:
        first = row * row_length + 1
        places = np.arange(first, min(first + row_length, len(part.tokens)))
        return np.searchsorted(part.offsets, places, side="right") - 1
    examples = part.order[slice(*part.rows[row : row + 2].tolist())]
    return np.repeat(examples, part.offsets[examples + 1] - part.offsets[examples] - 1)


def _fill_text_row(part: Part, row: int, out: dict[str, np.ndarray], *, isolated: bool) -> None:
    """A window of the running text; where isolated, cut into its documents."""
    row_length = len(out["input_ids"])
    first = row * row_length
    tokens = part.ids(first, first + row_length + 1)
    count = len(tokens) - 1
    out["input_ids"][:count], out["targets"][:count] = tokens[:-1], tokens[1:]
    places = np.arange(first, first + count)
    if not isolated:
        out["segments"][:count], out["positions"][:count] = 1, places - first
        return
    documents = np.searchsorted(part.offsets, np.arange(first, first + count + 1), side="right") - 1
    own, following = documents[:-1], documents[1:]
    out["targets"][:count][own != following] = IGNORE
    out["segments"][:count] = own - own[0] + 1
    out["positions"][:count] = places - np.maximum(part.offsets[own], first)


def _fill_chat_row(part: Part, row: int, out: dict[str, np.ndarray]) -> None:
    """The examples of a row one after the other, each its own segment."""
    assert part.rows is not None and part.order is not None and part.trained is not None
    place = 0
    first, end = part.rows[row : row + 2].tolist()
    for segment, example in enumerate(part.order[first:end].tolist(), start=1):
        start, stop = part.offsets[example : example + 2].tolist()
        tokens = part.ids(start, stop)
        span = slice(place, place + len(tokens) - 1)
        out["input_ids"][span] = tokens[:-1]
        out["targets"][span] = np.where(part.trained[start + 1 : stop], tokens[1:], IGNORE)
        out["positions"][span] = np.arange(len(tokens) - 1)
        out["segments"][span] = segment
        place = span.stop
