"""Rows that cannot be used: what is wrong with them, grouped so that a page can hold it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mule.data.check.findings import Finding, Place, Problem, counted
from mule.errors import DataError

_MAX_KINDS = 12  # different complaints listed; more would hide the first ones
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\([^)]*\)|\\u[0-9a-f]{4}|\d[\d,.]*")


class Kinds:
    """DataErrors by kind: the same message but for names and numbers in it."""

    def __init__(self, code: str) -> None:
        self._code = code
        self._found: dict[str, tuple[DataError, Finding]] = {}
        self._more = Finding()

    @property
    def count(self) -> int:
        return self._more.count + sum(finding.count for _, finding in self._found.values())

    def add(self, error: DataError) -> None:
        kind = _PARTICULARS.sub("?", error.what)
        place = Place(error.file, error.line, error.what)
        if kind not in self._found and len(self._found) >= _MAX_KINDS:
            self._more.add(place)
            return
        self._found.setdefault(kind, (error, Finding()))[1].add(place)

    def problems(self) -> Iterator[Problem]:
        for error, finding in self._found.values():
            others = finding.count - 1
            message = (
                f"{error.what} (and {counted(others, 'row')} like it)" if others else error.what
            )
            yield Problem("error", self._code, message, error.hint, finding)
        if self._more.count:
            message = f"{counted(self._more.count, 'row')} with other complaints"
            yield Problem("error", self._code, message, "mend the ones above first", self._more)
