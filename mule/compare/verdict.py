"""What is said of one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mule.compare.sourced import Setup
from mule.message import Message

Word = Literal["near", "ahead", "behind", "unusual", "not comparable"]


@dataclass(frozen=True)
class Verdict:
    """The word, its reason, and where the figures that it rests on are from."""

    key: str
    word: Word
    reason: str
    sources: tuple[str, ...] = ()

    @classmethod
    def of(cls, key: str, word: Word, reason: str, cited: Sequence[Setup] = ()) -> Verdict:
        """With the sources of the parameter in the setups that are cited."""
        sources = []
        for setup in cited:
            if (value := setup.values.get(key)) is not None:
                rests = (
                    ""
                    if value.checked
                    else Message("; not read there, it rests on: {}", value.rests_on)
                )
                sources.append(Message("{}: {}{}", setup.title, value.source, rests))
        return cls(key, word, reason, tuple(dict.fromkeys(sources)))
