"""Prepared data on disk: folders of plain binary files and an index, read by memory map.

tokens.bin   every token in the order of the sources, uint16 or uint32
trained.bin  chat only: 1 where the token is a target, uint8
offsets.bin  where each document or example starts, and the end, int64
digests.bin  of each document or conversation read, also of those left out, uint64
labels.bin   validation only: the place of each document's or example's label in the index, uint8
order.bin    chat only: the examples in the order of the rows, int64
rows.bin     chat only: where each row starts in the order, and the end, int64
index.json   the counts, the settings, and where it came from

Data prepared by several workers is several such folders, the parts, and an index that names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mule import fsio
from mule.data.labels import Label
from mule.errors import StorageError

VERSION = 2
INDEX = "index.json"
TOKENS, TRAINED, OFFSETS, DIGESTS = "tokens.bin", "trained.bin", "offsets.bin", "digests.bin"
LABELS, ORDER, ROWS = "labels.bin", "order.bin", "rows.bin"
_ROW_STEP = 64  # rows of chats are as long as the fullest needs, in such steps

_HINT = "delete the folder: it is made again from the source files"


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one worker. Arrays are memory maps.

    kind text: row r is tokens[r * row_length : (r + 1) * row_length + 1].
    kind chat: row r holds the examples order[rows[r] : rows[r + 1]]; example e is
    tokens[offsets[e] : offsets[e + 1]]; its last token is a target only, never an input.
    Document or example e has the label label_places[labels[e]] of the shards. Token ids are below
    vocab_size, where it was recorded.
    """

    num_rows: int
    vocab_size: int | None
    tokens: np.ndarray
    offsets: np.ndarray
    digests: np.ndarray
    trained: np.ndarray | None
    order: np.ndarray | None
    rows: np.ndarray | None
    labels: np.ndarray | None
    label_places: np.ndarray

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Tokens as int64. StorageError for an id that no token has: it would end in a lookup."""
        found = self.tokens[start:stop].astype(np.int64)
        if self.vocab_size is not None and found.max(initial=0) >= self.vocab_size:
            place = int((found >= self.vocab_size).argmax())
            assert isinstance(self.tokens, np.memmap)
            raise StorageError(
                f"{self.tokens.filename}: token {start + place:,} has the id {found[place]:,}, and the "
                f"tokenizer {self.vocab_size:,} tokens: the file is damaged",
                _HINT,
            )
        return found


@dataclass(frozen=True, eq=False)
class Shards:
    """Prepared rows: those of the first part, then of the second, and so on.

    `labels` are the sources and categories of the examples; one without a name where they were not
    recorded, as in training rows.
    """

    folder: Path
    index: dict[str, Any]
    parts: Sequence[Part]
    labels: Sequence[Label]

    @property
    def kind(self) -> str:
        return self.index["kind"]

    @property
    def num_rows(self) -> int:
        return self.index["num_rows"]

    @property
    def num_tokens(self) -> int:
        return self.index["num_tokens"]

    @property
    def num_examples(self) -> int:
        """Documents, or chat examples."""
        return self.index["num_examples"]

    @property
    def num_items(self) -> int:
        """Documents or conversations read, those left out for their length among them."""
        return sum(len(part.digests) for part in self.parts)

    @property
    def num_targets(self) -> int:
        """Trained tokens in one pass over all rows."""
        return self.index["num_targets"]

    @cached_property
    def row_length(self) -> int:
        """Positions of a row; of chats no more than the fullest row needs."""
        length = self.index["row_length"]
        if self.kind != "chat":
            return length
        fullest = max(_fullest_row(part) for part in self.parts)
        return min(length, _ROW_STEP * max(1, -(-fullest // _ROW_STEP)))

    @property
    def isolated(self) -> bool:
        """Whether attention must stay within documents."""
        return self.kind == "chat" or self.index["document_mask"]

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.index["tokenizer"]

    @property
    def fill(self) -> float:
        """Share of the positions of all rows that hold a token."""
        never_inputs = self.num_examples if self.kind == "chat" else len(self.parts)
        return min(1.0, (self.num_tokens - never_inputs) / (self.num_rows * self.row_length))

    def locate(self, row: int) -> tuple[Part, int]:
        """The part that holds a row, and the row's number there."""
        place = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self.parts[place], row - int(self._first_rows[place])

    @cached_property
    def _first_rows(self) -> np.ndarray:
        return np.cumsum([0, *(part.num_rows for part in self.parts)])[:-1]


def _fullest_row(part: Part) -> int:
    """The positions that the fullest row of chats takes; the last token of a chat takes none."""
    assert part.order is not None and part.rows is not None
    taken = (np.diff(part.offsets) - 1)[part.order]
    return int(np.add.reduceat(taken, part.rows[:-1]).max(initial=1)) if len(taken) else 1


def open_shards(folder: str | Path) -> Shards:
    """Open prepared data. Raises StorageError when it is not that, or is damaged in size."""
    folder = Path(folder)
    index = _read_index(folder)
    folders = [folder / name for name in index.get("parts", ["."])]
    indexes = [_read_index(part) for part in folders]
    labels = list(dict.fromkeys(label for part in indexes for label in _labels(part)))
    parts = [_open_part(*part, labels) for part in zip(folders, indexes)]
    return Shards(folder, index, parts, labels)


def require_whole(shards: Shards) -> None:
    """StorageError when a file was cut since it was opened: the end of its last page reads as zeros.

    One that was removed or replaced can still be read as it was.
    """
    for part in shards.parts:
        for array in vars(part).values():
            if not isinstance(array, np.memmap) or array.filename is None:
                continue
            file = Path(array.filename)
            if file.exists() and file.stat().st_size < array.nbytes:
                raise StorageError(
                    f"{file} was cut to {file.stat().st_size:,} of its {array.nbytes:,} bytes while "
                    "this run reads it",
                    "leave prepared data alone while it is used; it is made again by itself",
                )


def data_files(kind: str, vocab_size: int, *, labelled: bool) -> dict[str, str]:
    """The data type of each file that grows while data is prepared."""
    types = {TOKENS: "uint16" if vocab_size <= 1 << 16 else "uint32"}
    if kind == "chat":
        types[TRAINED] = "uint8"
    types |= {OFFSETS: "int64", DIGESTS: "uint64"}
    return types | {LABELS: "uint8"} if labelled else types


def _read_index(folder: Path) -> dict[str, Any]:
    index = fsio.read_json(folder / INDEX)
    if index.get("version") != VERSION:
        raise StorageError(
            f"{folder}: prepared data of version {index.get('version')}; this Mule reads {VERSION}",
            _HINT,
        )
    return index


def _labels(index: dict[str, Any]) -> list[Label]:
    return [Label(**label) for label in index.get("labels", [{"source": ""}])]


def _open_part(folder: Path, index: dict[str, Any], labels: list[Label]) -> Part:
    num_tokens, is_chat = index["num_tokens"], index["kind"] == "chat"
    num_examples, num_rows = index["num_examples"], index["num_rows"]
    places = [labels.index(label) for label in _labels(index)]
    return Part(
        num_rows=num_rows,
        vocab_size=index.get("vocab_size"),
        tokens=_map(folder / TOKENS, index["dtype"], num_tokens),
        offsets=_map(folder / OFFSETS, "int64", num_examples + 1),
        digests=_map(folder / DIGESTS, "uint64", index["num_items"]),
        trained=_map(folder / TRAINED, "uint8", num_tokens) if is_chat else None,
        order=_map(folder / ORDER, "int64", num_examples) if is_chat else None,
        rows=_map(folder / ROWS, "int64", num_rows + 1) if is_chat else None,
        labels=_map(folder / LABELS, "uint8", num_examples) if "labels" in index else None,
        label_places=np.array(places, dtype=np.int64),
    )


def _map(file: Path, dtype: str, count: int) -> np.ndarray:
    expected = count * np.dtype(dtype).itemsize
    found = file.stat().st_size if file.is_file() else 0
    if found != expected:
        raise StorageError(f"{file}: {found:,} bytes where the index says {expected:,}", _HINT)
    return np.memmap(file, dtype=dtype, mode="r", shape=(count,))
