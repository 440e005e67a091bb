"""Rows of a Parquet file, a few at a time: a small file may unpack to far more than memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mule.data.sources.files import (
    BOMB_BYTES,
    BOMB_RATIO,
    OnBytes,
    compression,
    open_file,
    open_unpacked,
)
from mule.data.sources.row import Row
from mule.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 128  # these many rows of a size nobody foresaw must fit
_COPY_BYTES = 1 << 20


def scan(
    file: Path, on_bytes: OnBytes | None = None, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """Every row, its line being its number. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    with _seekable(file) as opened:
        try:
            with pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True) as table:
                _check(file, table)
                for batch in _told(table, _batches(table, columns), file, on_bytes):
                    for value in _values(file, number, batch):
                        number += 1
                        yield Row(value, str(file), number)
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise DataError(
                file, None, f"cut off or not Parquet ({reason})", "copy the file again"
            ) from None
    if number == 0:
        raise DataError(file, None, "no rows in this file", "put data in it, or leave it out")


@contextlib.contextmanager
def _seekable(file: Path) -> Iterator[IO[bytes]]:
    """The Parquet content; .gz and .zst are unpacked to a temporary file, which has no name."""
    if not compression(file):
        with open_file(file) as opened:
            yield opened
        return
    with tempfile.TemporaryFile() as unpacked:
        with open_unpacked(file) as stream:
            while content := stream.read(_COPY_BYTES):
                unpacked.write(content)
        unpacked.seek(0)
        yield unpacked


def _check(file: Path, table: pyarrow.parquet.ParquetFile) -> None:
    names = table.schema_arrow.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(
            file, None, f'two columns are called "{twice[0]}"', "rename one of the columns"
        )
    # Of the groups only, since pyarrow 26 aborts where a broken file makes it look at a column.
    meta = table.metadata
    unpacked_bytes = sum(meta.row_group(n).total_byte_size for n in range(meta.num_row_groups))
    stored_bytes = file.stat().st_size
    if unpacked_bytes > max(BOMB_BYTES, BOMB_RATIO * stored_bytes):
        raise DataError(
            file,
            None,
            f"{stored_bytes:,} bytes unpack to {unpacked_bytes:,} (over {BOMB_RATIO} times and "
            "100 MB): this looks like a decompression bomb",
            "if it is meant, write the rows as JSON lines and give that file",
        )


def _batches(
    table: pyarrow.parquet.ParquetFile, columns: Sequence[str] | None
) -> Iterator[pyarrow.RecordBatch]:
    """All rows in batches of about 8 MB, starting with one row and at most doubling."""
    rows = 1
    wanted = None
    if columns is not None:
        wanted = [name for name in table.schema_arrow.names if name in columns]
    for batch in table.iter_batches(batch_size=rows, columns=wanted, use_threads=False):
        yield batch
        row_bytes = _num_bytes(batch) / max(1, batch.num_rows)
        fitting = int(_BATCH_BYTES / max(1.0, row_bytes))
        rows = max(1, min(2 * rows, fitting, _MAX_BATCH_ROWS))
        table.reader.set_batch_size(rows)  # holds from the next batch on


def _num_bytes(batch: pyarrow.RecordBatch) -> int:
    """Bytes of the values, those counted each time that a dictionary holds only once."""
    import pyarrow

    return sum(
        column.dictionary_decode().nbytes
        if pyarrow.types.is_dictionary(column.type)
        else column.nbytes
        for column in batch.columns
    )


def _told(
    table: pyarrow.parquet.ParquetFile,
    batches: Iterator[pyarrow.RecordBatch],
    file: Path,
    on_bytes: OnBytes | None,
) -> Iterator[pyarrow.RecordBatch]:
    """The batches; `on_bytes` gets the share of the file that each of them is."""
    size_bytes, num_rows = file.stat().st_size, max(1, table.metadata.num_rows)
    rows = told_bytes = 0
    for batch in batches:
        yield batch
        rows += batch.num_rows
        if on_bytes is not None:
            on_bytes(size_bytes * rows // num_rows - told_bytes)
            told_bytes = size_bytes * rows // num_rows


def _values(file: Path, before: int, batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    """The rows as Python values; DataError with the number of the row that has none."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        pass
    for place in range(batch.num_rows):
        try:
            batch.slice(place, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            raise DataError(
                file,
                before + place + 1,
                f"a value that cannot be read ({error})",
                "correct the row, or write the file again as UTF-8",
            ) from None
    raise AssertionError("each row alone could be read")
