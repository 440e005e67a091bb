"""Rows of any data file that holds rows: JSON lines, a JSON list, CSV, TSV or Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mule.data.sources import csv_rows, lines, parquet
from mule.data.sources.files import SUFFIXES, OnBytes, data_suffix, refuse_other_kinds
from mule.data.sources.row import Row
from mule.errors import DataError

__all__ = ["Row", "read_rows", "scan_rows"]
_JSON = (".jsonl", ".json", ".ndjson")
_CSV = (".csv", ".tsv")


def read_rows(
    file: Path, on_bytes: OnBytes | None = None, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """Every row of a file, in order. Raises DataError at the first problem, or without any row.

    `columns`: of a Parquet file, read only these; other files give every row whole.
    """
    for row in _scan(file, on_bytes, columns):
        if isinstance(row, DataError):
            raise row
        yield row


def scan_rows(
    file: Path, on_bytes: OnBytes | None = None, columns: Sequence[str] | None = None
) -> Iterator[Row | DataError]:
    """Like `read_rows`, with a DataError as a value in place of each bad row.

    Reading goes on behind it where that is possible; where it is not, the error comes last.
    """
    try:
        yield from _scan(file, on_bytes, columns)
    except DataError as error:
        yield error


def _scan(
    file: Path, on_bytes: OnBytes | None, columns: Sequence[str] | None
) -> Iterator[Row | DataError]:
    suffix = data_suffix(file)
    if suffix in _JSON:
        return lines.scan(file, on_bytes)
    if suffix in _CSV:
        return csv_rows.scan(file, on_bytes)
    if suffix == ".parquet":
        return parquet.scan(file, on_bytes, columns)
    refuse_other_kinds(file)
    if suffix in SUFFIXES:
        raise DataError(
            file, None, f"a {suffix} file holds text, not rows", "set data.format to text"
        )
    raise DataError(
        file,
        None,
        f"unknown kind of file {suffix!r}",
        f"rename it to one of {', '.join(SUFFIXES)}, or set data.format to text",
    )
