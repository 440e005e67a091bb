"""Small or endless files that would fill the memory; each is read in a process of its own."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

_CHILD = """
import json, resource, sys
from pathlib import Path
from mule.data.sources.rows import scan_rows
from mule.errors import DataError
rows, error = 0, None
for found in scan_rows(Path(sys.argv[1])):
    rows, error = rows + 1, found
    if not isinstance(found, DataError):
        error = None
mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
if sys.platform == "linux":  # where ru_maxrss counts what the parent held when it forked
    status = Path("/proc/self/status").read_text()
    mib = int(status.partition("VmHWM:")[2].split()[0]) / 2**10
print(json.dumps({"rows": rows, "error": str(error or ""), "peak_mib": mib}))
"""
_LINE = b'{"text": "' + b"a" * 1000 + b'"}\n'
_MIB = 2**20


def _read_in_child(file: Path) -> dict:
    command = [sys.executable, "-c", _CHILD, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def _long_line(file: Path) -> None:
    with open(file, "wb") as opened:
        opened.write(b'[{"text": "' if file.suffix == ".json" else b'{"text": "one"}\n{"text": "')
        for _ in range(500 if file.suffix == ".jsonl" else 100):
            opened.write(b"a" * 10**6)


def _long_cell(file: Path) -> None:
    with open(file, "wb") as opened:
        opened.write(b'text\none\n"')
        for _ in range(100):
            opened.write(b"a b c d \n" * 111_112)


def _packed(file: Path) -> None:
    if file.suffix == ".gz":
        with gzip.open(file, "wb", compresslevel=6) as opened:
            for _ in range(150):
                opened.write(_LINE * 1000)
        return
    with pyarrow.CompressedOutputStream(str(file), "zstd") as stream:
        for _ in range(150):
            stream.write(_LINE * 1000)


def _dictionary(file: Path) -> None:
    """2 GB of text in 200 kB: one text of 1 kB, two million times."""
    values = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 2_000_000, pyarrow.int8()), pyarrow.array(["y" * 1000])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), file)


def _large_values(file: Path) -> None:
    """3 GB: a small text, then one of 1 MB, over and over."""
    values = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 500 + [1] * 3000, pyarrow.int8()), pyarrow.array(["y", "z" * 10**6])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), file)


def _zeros(file: Path) -> None:
    table = pyarrow.table({"text": ["z" * 1000] * 150_000})
    pyarrow.parquet.write_table(table, file, use_dictionary=False, compression="zstd")


@pytest.mark.parametrize(
    ("name", "build", "message", "rows"),
    [
        ("a.jsonl", _long_line, r"a.jsonl:2: the row is longer than 64 MB", 2),
        ("a.json", _long_line, r"a.json:1: the row that begins here is longer than 64 MB", 1),
        pytest.param(
            "a.csv",
            _long_cell,
            r"a.csv:3: the row that begins here is longer than 64 MB",
            2,
            marks=pytest.mark.slow,
        ),
        ("a.jsonl.gz", _packed, "this looks like a decompression bomb", None),
        ("a.jsonl.zst", _packed, "this looks like a decompression bomb", None),
        pytest.param("a.parquet", _dictionary, "", 2_000_000, marks=pytest.mark.slow),
        ("b.parquet", _large_values, "", 3_500),
        ("c.parquet", _zeros, "this looks like a decompression bomb", 1),
    ],
)
def test_memory_stays_bounded(
    tmp_path: Path, name: str, build: Callable[[Path], None], message: str, rows: int | None
) -> None:
    build(tmp_path / name)
    done = _read_in_child(tmp_path / name)
    assert message in done["error"]
    assert ("\nhint: " in done["error"]) == bool(message)
    assert rows is None or done["rows"] == rows
    assert done["peak_mib"] < 600


def test_a_bomb_is_told_with_both_sizes_and_the_command(tmp_path: Path) -> None:
    _packed(tmp_path / "a.jsonl.gz")
    error = _read_in_child(tmp_path / "a.jsonl.gz")["error"]
    size = (tmp_path / "a.jsonl.gz").stat().st_size
    assert f"{size:,} bytes unpack to more than 1" in error
    assert "over 200 times and 100 MB" in error
    assert "give that file: gunzip -k a.jsonl.gz" in error
