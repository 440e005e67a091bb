"""Writing prepared data piece by piece, so that a killed process goes on where it was."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from mule import fsio
from mule.data.pack import best_fit
from mule.data.shards import (
    DIGESTS,
    INDEX,
    LABELS,
    OFFSETS,
    ORDER,
    ROWS,
    TOKENS,
    TRAINED,
    VERSION,
    data_files,
)


@dataclass(frozen=True)
class Counts:
    """How much is written; these decide the sizes of the files."""

    num_tokens: int = 0
    num_examples: int = 0
    num_items: int = 0
    num_targets: int = 0
    num_dropped: int = 0
    num_truncated: int = 0


@dataclass(frozen=True, eq=False)
class Block:
    """Encoded examples to append.

    ids (n,), trained (n,) or None, ends: where in `ids` an example ends (the last may go on in
    the next block), digests: of the items that end here, labels: one for each of `ends`.
    """

    ids: np.ndarray
    trained: np.ndarray | None
    ends: np.ndarray
    digests: np.ndarray
    labels: np.ndarray
    num_dropped: int = 0
    num_truncated: int = 0


class ShardWriter:
    """Appends to a folder in the making; `counts` are those of the last sync, to go on from."""

    def __init__(
        self, folder: Path, kind: str, vocab_size: int, counts: Counts, *, labelled: bool
    ) -> None:
        self._folder, self.kind, self.counts = folder, kind, counts
        self._vocab_size = vocab_size
        self._types = data_files(kind, vocab_size, labelled=labelled)
        sizes = _sizes(self._types, counts)
        self._files: dict[str, IO[bytes]] = {}
        for name in self._types:
            self._files[name] = file = open(folder / name, "ab")
            file.truncate(sizes[name] if counts != Counts() else 0)
            file.seek(0, os.SEEK_END)
        if counts == Counts():
            self._write(OFFSETS, np.zeros(1, dtype=np.int64))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def append(self, block: Block) -> None:
        """Write the tokens of a block, with one write a file."""
        self._write(TOKENS, block.ids)
        if block.trained is not None:
            self._write(TRAINED, block.trained)
        self._write(OFFSETS, block.ends + self.counts.num_tokens)
        self._write(DIGESTS, block.digests)
        if LABELS in self._types:
            self._write(LABELS, block.labels)
        counts = self.counts
        self.counts = Counts(
            num_tokens=counts.num_tokens + len(block.ids),
            num_examples=counts.num_examples + len(block.ends),
            num_items=counts.num_items + len(block.digests),
            num_targets=counts.num_targets
            + (0 if block.trained is None else int(np.count_nonzero(block.trained))),
            num_dropped=counts.num_dropped + block.num_dropped,
            num_truncated=counts.num_truncated + block.num_truncated,
        )

    def sync(self) -> Counts:
        """Make what was appended durable."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return self.counts

    def finish_text(self, row_length: int, *, keep_last: bool, document_mask: bool) -> int:
        """Count rows and targets of a running text; the number of rows."""
        num_windows = self.counts.num_tokens - 1
        num_rows = -(-num_windows // row_length) if keep_last else num_windows // row_length
        num_targets = min(num_windows, num_rows * row_length)
        if document_mask:  # the first token of a document is nobody's target
            starts = self._offsets()[1:]
            num_targets -= int(np.searchsorted(starts, num_targets, side="right"))
        self.counts = replace(self.counts, num_targets=num_targets)
        return num_rows

    def finish_chat(self, row_length: int, *, packing: bool) -> int:
        """Decide which examples share a row; the number of rows."""
        if packing:
            lengths = np.diff(self._offsets()) - 1  # the last token is no input
            order, rows = best_fit(lengths, row_length)
        else:
            order = np.arange(self.counts.num_examples)
            rows = np.arange(self.counts.num_examples + 1)
        order.astype(np.int64).tofile(self._folder / ORDER)
        rows.astype(np.int64).tofile(self._folder / ROWS)
        return len(rows) - 1

    def write_index(self, facts: dict[str, Any]) -> None:
        """`facts` has num_rows, row_length and the origin."""
        tokens = {"dtype": self._types[TOKENS], "vocab_size": self._vocab_size}
        index = {"version": VERSION, "kind": self.kind, **tokens, **asdict(self.counts), **facts}
        fsio.write_json(self._folder / INDEX, index)

    def _offsets(self) -> np.ndarray:
        return np.fromfile(self._folder / OFFSETS, dtype=np.int64)

    def _write(self, name: str, array: np.ndarray) -> None:
        self._files[name].write(array.astype(self._types[name], copy=False).data)


def holds(folder: Path, kind: str, vocab_size: int, counts: Counts, *, labelled: bool) -> bool:
    """Whether the files of `folder` hold at least what `counts` says."""
    sizes = _sizes(data_files(kind, vocab_size, labelled=labelled), counts)
    files = {name: folder / name for name in sizes}
    return all(f.is_file() and f.stat().st_size >= sizes[n] for n, f in files.items())


def _sizes(types: dict[str, str], counts: Counts) -> dict[str, int]:
    lengths = {
        TOKENS: counts.num_tokens,
        TRAINED: counts.num_tokens,
        OFFSETS: counts.num_examples + 1,
        DIGESTS: counts.num_items,
        LABELS: counts.num_examples,
    }
    return {name: lengths[name] * np.dtype(dtype).itemsize for name, dtype in types.items()}
