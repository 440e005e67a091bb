"""What a format of rows is: the keys it needs, and how its rows become items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol

from mule.data.sources.items import Item, Notice
from mule.data.sources.options import ReadOptions
from mule.data.sources.row import Row
from mule.errors import DataError

ORIGIN = ("source", "category")  # what a row of any format may say of itself


class Collector(Protocol):
    """Makes items out of several rows, or several items out of a row."""

    def add(self, row: Row) -> Iterator[Item | DataError]: ...
    def finish(self) -> Iterator[Item | DataError | Notice]: ...


@dataclass(frozen=True)
class Format:
    """A format. A row has it when all keys of one of the sets in `keys` are there and not null.

    `optional` keys are used where they are there. `facts` are those of its keys that hold nothing
    to learn, so that a row of another format may have them too. `refuse` raises DataError: rows
    that are read and checked, but not trained on.
    """

    name: str
    kind: Literal["document", "conversation", "preference"]
    purpose: str
    keys: tuple[tuple[str, ...], ...] = ()
    optional: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    parse: Callable[[Row], Item] | None = None
    collect: Callable[[str, ReadOptions], Collector] | None = None
    refuse: Callable[[Row], NoReturn] | None = None

    @property
    def used(self) -> frozenset[str]:
        """Every key it looks at."""
        return frozenset(self.optional).union(*self.keys, self.facts, ORIGIN)

    @property
    def content(self) -> frozenset[str]:
        """The keys that hold what can be learnt."""
        return self.used.difference(self.facts, ORIGIN)
