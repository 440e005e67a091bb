"""Prepared data on disk: a folder of plain binary files and an index, read by memory map.

tokens.bin   every token, uint16 or uint32
trained.bin  chat only: 1 where the token is a target, uint8
offsets.bin  where each document or example starts, and the end, int64
rows.bin     chat only: the first example of each row, and the end, int64
index.json   the counts, the settings, and where it came from
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mule import fsio
from mule.errors import StorageError

VERSION = 1
_TOKENS, _TRAINED, _OFFSETS, _ROWS = "tokens.bin", "trained.bin", "offsets.bin", "rows.bin"
_INDEX = "index.json"


@dataclass(frozen=True, eq=False)
class Shards:
    """Prepared rows. Arrays are memory maps.

    kind text: row r is tokens[r * row_length : (r + 1) * row_length + 1].
    kind chat: row r holds the examples rows[r] .. rows[r + 1] - 1; example e is
    tokens[offsets[e] : offsets[e + 1]]; its last token is a target only, never an input.
    """

    folder: Path
    index: dict[str, Any]
    tokens: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray | None
    rows: np.ndarray | None

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
    def num_targets(self) -> int:
        """Trained tokens in one pass over all rows."""
        return self.index["num_targets"]

    @property
    def row_length(self) -> int:
        return self.index["row_length"]

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
        inputs = self.num_tokens - (self.num_examples if self.kind == "chat" else 1)
        return min(1.0, inputs / (self.num_rows * self.row_length))


def open_shards(folder: str | Path) -> Shards:
    """Open a prepared folder. Raises StorageError when it is not one, or is damaged in size."""
    folder = Path(folder)
    index = fsio.read_json(folder / _INDEX)
    if index.get("version") != VERSION:
        raise StorageError(
            f"{folder}: prepared data of version {index.get('version')}; this Mule reads {VERSION}",
            "delete the folder: it is made again from the source files",
        )
    num_tokens, is_chat = index["num_tokens"], index["kind"] == "chat"
    return Shards(
        folder=folder,
        index=index,
        tokens=_map(folder / _TOKENS, index["dtype"], num_tokens),
        offsets=_map(folder / _OFFSETS, "int64", index["num_examples"] + 1),
        trained=_map(folder / _TRAINED, "uint8", num_tokens) if is_chat else None,
        rows=_map(folder / _ROWS, "int64", index["num_rows"] + 1) if is_chat else None,
    )


class ShardWriter:
    """Writes a prepared folder (already temporary, from fsio.atomic_folder) piece by piece."""

    def __init__(self, folder: Path, kind: str, vocab_size: int) -> None:
        self._folder, self._kind = folder, kind
        self._dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._tokens = open(folder / _TOKENS, "wb")
        self._trained = open(folder / _TRAINED, "wb") if kind == "chat" else None
        self._offsets = [0]
        self.num_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def add(self, ids: np.ndarray | list[int], trained: np.ndarray | None = None) -> None:
        """Append tokens to the document or example in progress."""
        np.asarray(ids, dtype=self._dtype).tofile(self._tokens)
        self.num_tokens += len(ids)
        if self._trained is not None:
            assert trained is not None and len(trained) == len(ids)
            trained.astype(np.uint8).tofile(self._trained)

    def end(self) -> None:
        """End the document or example in progress."""
        self._offsets.append(self.num_tokens)

    @property
    def num_examples(self) -> int:
        return len(self._offsets) - 1

    def offsets(self) -> np.ndarray:
        return np.asarray(self._offsets, dtype=np.int64)

    def finish(self, facts: dict[str, Any], row_starts: np.ndarray | None = None) -> None:
        """Write the tables and the index; `facts` has num_rows, row_length and the origin."""
        self._close()
        self.offsets().tofile(self._folder / _OFFSETS)
        if row_starts is not None:
            row_starts.astype(np.int64).tofile(self._folder / _ROWS)
        index = {
            "version": VERSION,
            "kind": self._kind,
            "dtype": self._dtype,
            "num_tokens": self.num_tokens,
            "num_examples": self.num_examples,
            **facts,
        }
        fsio.write_json(self._folder / _INDEX, index)

    def _close(self) -> None:
        self._tokens.close()
        if self._trained is not None:
            self._trained.close()


def _map(file: Path, dtype: str, count: int) -> np.ndarray:
    expected = count * np.dtype(dtype).itemsize
    found = file.stat().st_size if file.is_file() else 0
    if found != expected:
        raise StorageError(
            f"{file}: {found:,} bytes where the index says {expected:,}",
            "delete the folder: it is made again from the source files",
        )
    return np.memmap(file, dtype=dtype, mode="r", shape=(count,))
