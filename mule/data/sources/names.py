"""Short names for data sources, as a person would call them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Container, Sequence
from itertools import chain, count, takewhile
from pathlib import Path

_NO_NAME = re.compile(r"(train|valid|validation|test|dev|val|data|main|default|split)([-_.].*)?")


def source_name(path: str, files: Sequence[Path]) -> str:
    """The last part of the path that says something: alpaca_en_demo, or gsm8k of gsm8k/train.

    Of a pattern's files it is what all their names begin with, if that says something.
    """
    given = Path(path)
    is_pattern = glob.has_magic(path) and not given.exists()
    whole = _in_common([file.resolve() for file in files]) if is_pattern else given
    parts = [part for part in whole.parts if part not in ("/", ".", "..") and "*" not in part]
    for part in reversed(parts or Path.cwd().parts):
        name = stem(part)
        if name and not _NO_NAME.fullmatch(name.lower()):
            return name
    return stem(parts[-1]) if parts else "data"


def _in_common(files: Sequence[Path]) -> Path:
    """The beginning that all the paths have; one file's whole path."""
    if len(files) == 1:
        return files[0]
    folder = Path(os.path.commonpath([file.parent for file in files]))
    columns = zip(*(file.name for file in files), strict=False)
    alike = takewhile(lambda column: len(set(column)) == 1, columns)
    name = "".join(column[0] for column in alike).rstrip("0123456789-_.")
    return folder / name if len(name) > 1 else folder


def free_name(path: str, files: Sequence[Path], taken: Container[str]) -> str:
    """The name of a source that stands beside others: none of those `taken`."""
    name = source_name(path, files)
    longer = f"{name}-{stem(Path(path).name)}"
    numbered = (f"{name}-{number}" for number in count(2))
    return next(name for name in chain([name, longer], numbered) if name not in taken)


def stem(name: str) -> str:
    """A file name without the suffixes of data files, a hub name without its revision."""
    plain = name.split("@")[0]
    for suffix in (".gz", ".zst", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"):
        plain = plain.removesuffix(suffix)
    for suffix in (".txt", ".md", ".tokens"):
        plain = plain.removesuffix(suffix)
    return plain
