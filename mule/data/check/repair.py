"""Copies of data files in which double-encoded text is repaired; the originals stay as they are."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mule import fsio, progress
from mule.data.check.encoding import repair_text, repair_value
from mule.data.sources.files import compression, data_suffix, open_unpacked
from mule.errors import DataError, UserError

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_MAX_JSON_BYTES = 1 << 30  # a JSON array is repaired in memory
_PARQUET_BATCH_ROWS = 1024
_CHECK = "mule data check shows what is wrong with it"


def repair_files(files: Mapping[Path, Path]) -> dict[str, int]:
    """Write a copy of each file (key) at its new place (value); the repaired texts of each copy.

    A copy has the layout of its original and differs in the repaired texts only. Where nothing is
    to repair in any file, nothing is written. Raises DataError for a file that cannot be read, and
    UserError where a copy would replace a file that is given.
    """
    _refuse_replacing(files)
    repaired: dict[str, int] = {}
    with progress.task("Repairing", total=len(files), unit="files") as bar:
        for source, target in files.items():
            if count := _repair_file(source, target):
                repaired[str(target)] = count
            bar.advance()
    if repaired:
        for source, target in files.items():
            if str(target) not in repaired:
                with fsio.stream_file(target) as temporary:
                    shutil.copyfile(source, temporary)
    return repaired


def _refuse_replacing(files: Mapping[Path, Path]) -> None:
    for target, count in Counter(target.absolute() for target in files.values()).items():
        if count > 1:
            raise UserError(
                f"{target}: {count} files would be copied to this place",
                "repair them one by one, each with its own --out",
            )
    for target in files.values():
        if any(target.exists() and target.samefile(source) for source in files):
            raise UserError(
                f"{target}: the repaired copy would replace an original",
                "give another folder with --out",
            )


class _NothingToRepair(Exception):
    """Leaves a copy unwritten."""


def _repair_file(source: Path, target: Path) -> int:
    """The number of repaired texts; without any, no copy is made."""
    try:
        with fsio.stream_file(target) as temporary:
            count = _write_copy(source, temporary)
            if not count:
                raise _NothingToRepair
    except _NothingToRepair:
        with contextlib.suppress(OSError):  # the folder made for the copy, if it is empty
            target.parent.rmdir()
        return 0
    return count


def _write_copy(source: Path, temporary: Path) -> int:
    suffix = data_suffix(source)
    if suffix == ".parquet":
        return _repair_parquet(source, temporary)
    with _create(temporary, compression(source)) as out:
        if suffix not in _JSON_SUFFIXES:
            return _repair_lines(source, out)
        return (_repair_json if _is_whole_json(source) else _repair_json_lines)(source, out)


def _repair_lines(source: Path, out: IO[bytes]) -> int:
    """Text, and CSV, whose quotes and separators a repair never touches: they are ASCII."""
    count = 0
    for number, line in _lines(source):
        text = _decoded(line, source, number)
        repaired = repair_text(text)
        count += repaired != text
        out.write(repaired.encode())
    return count


def _repair_json_lines(source: Path, out: IO[bytes]) -> int:
    count = 0
    for number, line in _lines(source):
        text = _decoded(line, source, number)
        start = "\ufeff" if text.startswith("\ufeff") else ""
        content = text.removeprefix(start)
        if not content.strip():
            out.write(line)
            continue
        value = _parsed(content, source, number)
        repaired = repair_value(value)
        if repaired == value:
            out.write(line)
            continue
        count += 1
        end = content[len(content.rstrip()) :]
        out.write((start + json.dumps(repaired, ensure_ascii=False) + end).encode())
    return count


def _repair_json(source: Path, out: IO[bytes]) -> int:
    """A JSON array: indented again as it was."""
    with open_unpacked(source) as stream:
        content = stream.read(_MAX_JSON_BYTES + 1)
    if len(content) > _MAX_JSON_BYTES:
        raise DataError(
            source,
            None,
            "a JSON array of more than 1 GiB is not repaired",
            "write it as JSON lines: one object a line",
        )
    text = _decoded(content, source, None)
    start = "\ufeff" if text.startswith("\ufeff") else ""
    value = _parsed(text.removeprefix(start), source, None)
    repaired = repair_value(value)
    rows = zip(repaired, value, strict=True) if isinstance(value, list) else [(repaired, value)]
    count = sum(new != old for new, old in rows)
    end = "\n" if text.endswith("\n") else ""
    out.write((start + _laid_out_like(text, repaired) + end).encode())
    return count


def _repair_parquet(source: Path, temporary: Path) -> int:
    """Row by row through Python, so that texts inside lists and structs are repaired too."""
    import pyarrow as pa
    from pyarrow import parquet

    count = 0
    try:
        file = parquet.ParquetFile(source)
        with file, parquet.ParquetWriter(temporary, file.schema_arrow) as writer:
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS):
                rows = batch.to_pylist()
                repaired = [repair_value(row) for row in rows]
                count += sum(new != old for new, old in zip(repaired, rows, strict=True))
                writer.write_batch(pa.RecordBatch.from_pylist(repaired, schema=batch.schema))
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(source, None, f"cannot be read ({reason})", _CHECK) from None
    return count


# ---------------------------------------------------------------- reading and writing


def _create(path: Path, packed: str) -> IO[bytes]:
    if not packed:
        return open(path, "wb")
    import pyarrow as pa

    return pa.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[packed])


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, each with its own line break."""
    with open_unpacked(source) as stream:
        yield from enumerate(stream, start=1)


def _is_whole_json(source: Path) -> bool:
    """Whether the file is one JSON value and not one a line."""
    with open_unpacked(source) as stream:
        text = stream.read(1 << 16).decode("utf-8-sig", errors="replace").lstrip()
    return text.startswith("[") or text.split("\n", 1)[0].strip() == "{"


def _decoded(line: bytes, source: Path, number: int | None) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise DataError(
            source,
            number,
            "not UTF-8, so there is no text to repair",
            "convert it first: iconv -f WINDOWS-1252 -t UTF-8, or the encoding it has",
        ) from None


def _parsed(text: str, source: Path, number: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(source, number, f"not valid JSON ({error})", _CHECK) from None


def _laid_out_like(text: str, value: Any) -> str:
    """`value` as JSON: on one line, an element a line, or indented, as `text` is."""
    second = [*text.split("\n", 2), ""][1]
    blanks = second[: len(second) - len(second.lstrip())]
    if isinstance(value, list) and second.rstrip().endswith(("},", "}]", "}")):
        rows = [blanks + json.dumps(row, ensure_ascii=False) for row in value]
        return "[\n" + ",\n".join(rows) + "\n]"
    return json.dumps(value, ensure_ascii=False, indent=(blanks or 0) if second else None)
