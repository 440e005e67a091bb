"""Where the examples of prepared data come from: the source and the category of each, as a number."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mule.data.sources import expand
from mule.data.sources.items import Conversation, Document
from mule.data.sources.names import free_name, source_name

OTHER = "other"  # what is too much to be listed
_MAX_SOURCES = 30  # more lines than this nobody reads
_MAX_CATEGORIES = 30  # of all sources together


class Label(NamedTuple):
    """A source by its short name, and a category of it or ""."""

    source: str
    category: str = ""


class Labels:
    """Numbers labels in the order in which they come; at most 92, so that a byte holds one."""

    def __init__(self, source_of: Mapping[str, str]) -> None:
        """`source_of` has the source of each file, for rows that do not name their own."""
        self._source_of = source_of
        self._numbers: dict[Label, int] = {}
        self._sources: set[str] = set()
        self._categories: set[Label] = set()

    @property
    def found(self) -> list[Label]:
        """The labels so far, each at the place of its number."""
        return list(self._numbers)

    def of(self, item: Document | Conversation) -> int:
        """The number of the item's label; beyond the limits, that of what is called other."""
        source = item.source or self._source_of.get(item.file, item.file)
        if not _has_room(self._sources, source, _MAX_SOURCES):
            source = OTHER
        label = Label(source, item.category)
        if item.category and not _has_room(self._categories, label, _MAX_CATEGORIES):
            label = Label(source, OTHER)
        return self._numbers.setdefault(label, len(self._numbers))


def _has_room(known: set[Any], value: Hashable, limit: int) -> bool:
    """Whether `value` is known, or can be: then it is from now on."""
    if len(known) < limit:
        known.add(value)
    return value in known


def files_by_source(paths: Sequence[str | Path]) -> dict[Path, str]:
    """The data files of `paths`, each once, and the source each belongs to.

    Every path given is a source; where there is one only, each of its files is, up to a limit:
    a large folder holds one source in many pieces. Raises DataError.
    """
    if len(paths) == 1:
        files = expand(paths)
        names = {file: source_name(str(file), [file]) for file in files}
        if len(set(names.values())) > _MAX_SOURCES:
            names = dict.fromkeys(files, source_name(str(paths[0]), files))
        return names
    found: dict[str, tuple[Path, str]] = {}
    taken: set[str] = set()
    for path in paths:
        files = expand([path])
        name = free_name(str(path), files, taken)
        taken.add(name)
        for file in files:
            found.setdefault(os.path.realpath(file), (file, name))
    return dict(found.values())
