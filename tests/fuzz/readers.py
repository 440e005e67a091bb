"""A process that feeds broken files to one reader: `python -m tests.fuzz.readers TARGET SECONDS`.

Only MuleError may come out. Each input gets 5 s and the process 4 GB; then it is killed, and the
input that did it is the file it leaves.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet

from mule.data.sources.encoding import read_text_parts
from mule.data.sources.files import data_suffix
from mule.data.sources.rows import Row, scan_rows
from mule.errors import DataError, MuleError
from tests.fuzz.mutate import json_text, mutate

_ROWS = [{"text": f'line {n}\n"é" 😀', "n": n, "more": [n, None, {"a": 1.5}]} for n in range(40)]
_MEMORY_BYTES = 4 << 30
_INPUT_S = 5


def _lines() -> list[bytes]:
    return ["".join(json.dumps(row) + end for row in _ROWS).encode() for end in ("\n", "\r\n\n")]


def _lists() -> list[bytes]:
    spread = {"data": _ROWS[:3]}
    return [
        json.dumps(value, indent=indent).encode()
        for value, indent in ((_ROWS, None), (_ROWS, 2), (spread, 1))
    ]


def _tables(delimiter: str) -> list[bytes]:
    seeds = []
    for quoting in (csv.QUOTE_ALL, csv.QUOTE_MINIMAL):
        file = io.StringIO()
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerows([("text", "n"), *((row["text"], row["n"]) for row in _ROWS)])
        seeds.append(file.getvalue().encode())
    return seeds


def _parquets() -> list[bytes]:
    seeds = []
    for codec in ("none", "snappy", "zstd", "gzip"):
        file = io.BytesIO()
        table = pyarrow.Table.from_pylist([{**row, "more": [row["n"], None]} for row in _ROWS])
        pyarrow.parquet.write_table(table, file, compression=codec, row_group_size=15)
        seeds.append(file.getvalue())
    return seeds


def _zst(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


def _packed(random: Random, pack: Callable[[bytes], bytes]) -> bytes:
    """The packed bytes broken, or broken bytes packed."""
    if random.random() < 0.7:
        return mutate(random, [pack(seed) for seed in _lines()])
    return pack(mutate(random, _lines()))


def _broken(random: Random, kind: str) -> bytes:
    from tests.fuzz import model_files  # which the other targets need not wait for

    return mutate(random, getattr(model_files, kind)())


TARGETS: dict[str, tuple[str, Callable[[Random], bytes]]] = {
    "jsonl": (".jsonl", lambda random: mutate(random, _lines())),
    "list": (".json", lambda random: mutate(random, _lists())),
    "grammar": (".json", lambda random: json_text(random, 6).encode()),
    "csv": (".csv", lambda random: mutate(random, _tables(","))),
    "tsv": (".tsv", lambda random: mutate(random, _tables("\t"))),
    "parquet": (".parquet", lambda random: mutate(random, _parquets())),
    "txt": (".txt", lambda random: mutate(random, ["é\r\n".encode() * 50, b"\n\nplain\r\n"])),
    "gz": (".jsonl.gz", lambda random: _packed(random, gzip.compress)),
    "zst": (".jsonl.zst", lambda random: _packed(random, _zst)),
    "gguf": (".gguf", lambda random: _broken(random, "ggufs")),
    "safetensors": (".safetensors", lambda random: _broken(random, "safetensors")),
}


def read(file: Path) -> None:
    """Read all of `file`; every row and every problem must be well formed."""
    if file.suffix in (".gguf", ".safetensors"):
        from tests.fuzz import model_files

        (model_files.read_gguf if file.suffix == ".gguf" else model_files.read_safetensors)(file)
        return
    if data_suffix(file) == ".txt":
        for text, line in read_text_parts(file):
            assert text.encode()
            assert line >= 1
        return
    found = list(scan_rows(file))
    assert found
    for item in found:
        assert isinstance(item, Row | DataError)
        assert item.line is None or item.line >= 1
        if isinstance(item, DataError):
            assert item.hint
            assert item.what


def main(target: str, seconds: float, folder: Path) -> int:
    """The number of inputs read."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    suffix, make = TARGETS[target]
    file = folder / f"input{suffix}"
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        file.write_bytes(make(Random(f"{target} {number}")))
        number += 1
        signal.alarm(_INPUT_S)  # SIGALRM ends the process, even inside a library
        try:
            read(file)
        except MuleError:
            pass
        signal.alarm(0)
    return number


if __name__ == "__main__":
    print(main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])))
