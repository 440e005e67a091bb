"""A setting that looks like a mistake, and how a check says so."""

from __future__ import annotations

from dataclasses import dataclass

from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Given

# How grave: the run learns nothing or stops / it is wrecked / it is wasted or not what was meant.
NOTHING, WRECKED, WASTED = 3, 2, 1
Texts = tuple[str, str, str]  # what was found, why it cannot be meant, what to write instead


@dataclass(frozen=True)
class Mistake:
    """What was found, why it cannot be meant, what to write instead, and who says so."""

    code: str
    gravity: int
    key: str
    line: int | None
    found: str
    why: str
    do: str
    source: str = ""


def say(
    setup: ForeignSetup, fact: str, code: str, gravity: int, texts: Texts, *, source: str = ""
) -> Mistake:
    """A mistake of a fact, at the key that it came from."""
    origin = setup.facts.get(fact)
    key = origin.key if origin is not None and origin.key else fact
    return Mistake(code, gravity, key, origin.line if origin else None, *texts, source)


def say_of(given: Given, code: str, gravity: int, texts: Texts) -> Mistake:
    """A mistake of a setting as the file has it."""
    return Mistake(code, gravity, given.key, given.line, *texts)


def is_adapter(setup: ForeignSetup) -> bool:
    """Whether an adapter is trained, and not all weights."""
    return setup.value("method", "full") != "full"
