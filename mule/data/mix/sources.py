"""The sources of a mix: their files, their short names, and the items in them."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from mule import fsio, machine, progress
from mule.data.clean.compare import TrainingItem
from mule.data.sources import Conversation, Document, Preference, ReadOptions, expand, split_files
from mule.data.sources.items import Notice
from mule.data.sources.names import free_name, stem
from mule.data.sources.reading import items_of
from mule.errors import DataError, UserError

# Peak memory of a mix by the bytes of its files. Measured on 60,000 rows of Alpaca and GSM8K: 5.5
# and 7.0 for JSON lines, 13 for Parquet of text that hardly packs (most packs twice as well).
_MEMORY_OF_TEXT = 8
_MEMORY_OF_PACKED = 25
_PACKED = (".parquet", ".gz", ".zst")
Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class Source:
    """`given` is what was typed; `valid` are the files of a folder that stay validation."""

    given: str
    name: str
    train: tuple[Path, ...]
    valid: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.train, *self.valid)

    def sums(self) -> list[dict[str, str | int]]:
        """Path, bytes and SHA-256 of each file."""
        return [
            {"path": str(file), "bytes": file.stat().st_size, "sha256": fsio.sha256_file(file)}
            for file in self.files
        ]


@dataclass
class Read:
    """Items in the order they were read, the source of each, and whether it is validation."""

    items: list[TrainingItem] = field(default_factory=list)
    source_of: list[int] = field(default_factory=list)
    is_valid: list[bool] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- which files


def open_sources(paths: Sequence[str | Path]) -> list[Source]:
    """The sources in the order given, each with a name of its own. Raises DataError."""
    if not paths:
        raise UserError(
            "no sources", "name files or folders: mule data mix a.json b.jsonl --out DIR"
        )
    found: list[Source] = []
    for path in paths:
        found.append(_open(str(path), taken={other.name for other in found}))
    _refuse_twice(found)
    return found


def by_source(
    sources: Sequence[Source], option: str, given: Mapping[str, Value]
) -> dict[int, Value]:
    """`given` under the number of the source that each key names. Raises UserError."""
    found: dict[int, Value] = {}
    for key, value in given.items():
        numbers = [n for n, source in enumerate(sources) if key in _keys(source)]
        if not numbers:
            known = sorted({name for source in sources for name in _keys(source)})
            near = difflib.get_close_matches(key, known, n=1)
            names = ", ".join(source.name for source in sources)
            raise UserError(
                f"{option} {key}: no source has this path, file name or stem",
                f"did you mean {near[0]}?" if near else f"the sources are {names}",
            )
        if len(numbers) > 1:
            paths = ", ".join(sources[n].given for n in numbers)
            raise UserError(
                f"{option} {key}: several sources have this name: {paths}",
                f"use the whole path, as in {option} {sources[numbers[0]].given}={value:g}",
            )
        if numbers[0] in found:
            raise UserError(
                f"{option} is given twice for {sources[numbers[0]].given}", "keep one of them"
            )
        found[numbers[0]] = value
    return found


def _refuse_twice(sources: Sequence[Source]) -> None:
    owners: dict[str, Source] = {}
    for source in sources:
        for file in source.files:
            owner = owners.setdefault(os.path.realpath(file), source)
            if owner is not source:
                raise UserError(
                    f"{file} is in two sources: {owner.given} and {source.given}",
                    f"give it once; --repeat {owner.name}=2 uses every row twice",
                )


def _open(path: str, taken: Set[str]) -> Source:
    train = expand([path])
    name = free_name(path, train, taken)
    given = Path(path)
    is_pattern = not given.exists() and glob.has_magic(path)
    if given.is_file() or is_pattern:
        return Source(path, name, tuple(train))
    folder = given if given.is_dir() else train[0].parent  # a hub dataset, downloaded
    is_divided = bool(split_files(folder, "train"))
    valid = split_files(folder, "valid") if is_divided else []
    notes = [
        f"{file} is a test set: left out (give it to --decontaminate to keep it clean)"
        for file in (split_files(folder, "test") if is_divided else [])
    ]
    return Source(path, name, tuple(train), tuple(valid), tuple(notes))


def _keys(source: Source) -> set[str]:
    given = source.given.rstrip("/")
    return {source.given, given, source.name, Path(given).name, stem(Path(given).name)}


# ---------------------------------------------------------------- what is in them


def read_sources(sources: Sequence[Source], options: ReadOptions) -> Read:
    """Every item. Raises DataError at the first problem, UserError when memory cannot hold them."""
    _require_memory(sources)
    read = Read()
    total = sum(file.stat().st_size for source in sources for file in source.files)
    with progress.task("Reading", total=total, unit="B") as bar:
        for number, source in enumerate(sources):
            for file in source.files:
                is_valid = file in source.valid
                for item in _items(file, options, read.notices, bar):
                    if read.items:
                        _refuse_other_kind(item, read.items[0])
                    read.items.append(item)
                    read.source_of.append(number)
                    read.is_valid.append(is_valid)
    return read


def read_evaluation(paths: Sequence[str]) -> list[TrainingItem]:
    """The items of evaluation sets: of a folder, its test files, else those for validation."""
    files: list[Path] = []
    for path in paths:
        is_folder = Path(path).is_dir()
        parts = [split_files(path, split) for split in ("test", "valid")] if is_folder else []
        files += next((part for part in parts if part), None) or expand([path])
    items: list[TrainingItem] = []
    with progress.task("Reading evaluation sets", total=len(files), unit="files") as bar:
        for file in files:
            for found in items_of(file, ReadOptions(), None, training=False):
                if isinstance(found, DataError):
                    raise found
                if isinstance(found, Preference):
                    turns = (*found.prompt, *found.chosen)
                    found = Conversation(turns, found.file, found.line)
                if isinstance(found, Document | Conversation):
                    items.append(found)
            bar.advance()
    return items


def _items(
    file: Path, options: ReadOptions, notices: list[str], bar: progress.Task
) -> Iterator[TrainingItem]:
    """The items of a file; a document that comes in pieces is made whole."""
    pieces: list[Document] = []
    for found in items_of(file, options, bar.advance, training=True):
        if isinstance(found, DataError):
            raise found
        if isinstance(found, Notice):
            notices.append(str(found))
        elif isinstance(found, Document):
            pieces.append(found)
            if found.ends:
                yield replace(pieces[0], text="".join(piece.text for piece in pieces), ends=True)
                pieces = []
        elif isinstance(found, Conversation):
            yield found


def _refuse_other_kind(item: TrainingItem, first: TrainingItem) -> None:
    if type(item) is not type(first):
        kinds = {Document: "a text to continue", Conversation: "a conversation"}
        raise DataError(
            item.file,
            item.line,
            f"{kinds[type(item)]}, where {first.file} holds {kinds[type(first)]}: the two are "
            "trained differently (all of a text, only the answers of a conversation)",
            "make two mixes: pretrain on the texts, then fine-tune on the conversations",
        )


def _require_memory(sources: Sequence[Source]) -> None:
    files = [file for source in sources for file in source.files]
    needed = sum(
        file.stat().st_size * (_MEMORY_OF_PACKED if file.suffix in _PACKED else _MEMORY_OF_TEXT)
        for file in files
    )
    available = machine.available_bytes()
    if needed > available:
        raise UserError(
            f"mixing needs about {needed / 2**30:.1f} GiB of memory for {len(files)} files, and "
            f"{available / 2**30:.1f} GiB is free",
            "mix fewer files at a time, or give a large source to data.train beside the mix: "
            "mule data prepare reads it in bounded memory",
        )


def inside(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is `folder` or lies in it."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
