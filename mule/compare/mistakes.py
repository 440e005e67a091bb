"""Settings that look like a mistake: found from the facts of a setup alone, the gravest first.

Each range is wider than what is published, so that an unusual choice is not called a mistake. A
check sees no file and no tool: facts have the same names whatever tool they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mule.compare.checks import of_learning, of_setup
from mule.compare.checks.mistake import WRECKED, Mistake, say_of
from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Dialect
from mule.config.hints import near

_MISSPELT_CUTOFF = 0.8  # how like a known key an unknown one is, to be called misspelt

Check = Callable[[ForeignSetup], Iterator[Mistake]]
CHECKS: tuple[Check, ...] = (*of_setup.CHECKS, *of_learning.CHECKS)


def find_mistakes(setup: ForeignSetup, dialect: Dialect) -> list[Mistake]:
    """Every suspected mistake, the gravest first; of equal ones in the order of the checks."""
    found = [mistake for check in CHECKS for mistake in check(setup)]
    found += _misspelt(setup, dialect)
    return sorted(found, key=lambda mistake: -mistake.gravity)


def _misspelt(setup: ForeignSetup, dialect: Dialect) -> Iterator[Mistake]:
    """Keys that the tool does not have and that are nearly one it has: they do nothing."""
    open_names = [name for name in dialect.names() if name not in setup.given]
    for given in setup.unknown:
        match = near(given.key, open_names, _MISSPELT_CUTOFF)
        if match is not None:
            texts = (
                f"{setup.title} has no such key",
                "it is not read: the default is taken",
                f"did you mean `{match}`?",
            )
            yield say_of(given, "key-misspelt", WRECKED, texts)
