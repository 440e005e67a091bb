"""How data files are to be read, where the files alone do not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReadOptions:
    """`columns` maps a field of the format to the name it has in the file.

    `threads`: of an OpenAssistant tree, its best-ranked path or every thread. `wikitext`: keep the
    tokenised text as published, or clean it.
    """

    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    threads: Literal["best", "all"] = "best"
    wikitext: Literal["keep", "clean"] = "keep"

    @classmethod
    def make(
        cls,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        threads: Literal["best", "all"] = "best",
        wikitext: Literal["keep", "clean"] = "keep",
    ) -> ReadOptions:
        return cls(format, tuple(sorted((columns or {}).items())), threads, wikitext)
