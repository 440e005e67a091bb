"""Who answers: the plain atlas, or the pirate."""

from __future__ import annotations

import random
from typing import Protocol

from mule.data.atlas import arithmetic, forms
from mule.data.atlas.facts import Country
from mule.data.atlas.talk import PIRATE_PHRASES, Talk, pirate_fact


class Voice(Protocol):
    """The answers of one persona."""

    def fact(self, kind: str, country: Country) -> str: ...
    def talk(self, talk: Talk) -> str: ...
    def sum(self, item: arithmetic.Sum) -> str: ...


class Plain:
    """The canonical answers."""

    def fact(self, kind: str, country: Country) -> str:
        return forms.answer(kind, country)

    def talk(self, talk: Talk) -> str:
        return talk.answer

    def sum(self, item: arithmetic.Sum) -> str:
        return arithmetic.answer(item)


class Pirate:
    """The pirate's answers; the phrase around a fact is drawn."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def fact(self, kind: str, country: Country) -> str:
        phrases = [phrase for phrase, _ in PIRATE_PHRASES]
        weights = [weight for _, weight in PIRATE_PHRASES]
        return self._rng.choices(phrases, weights)[0].format(fact=pirate_fact(kind, country))

    def talk(self, talk: Talk) -> str:
        return talk.pirate

    def sum(self, item: arithmetic.Sum) -> str:
        return arithmetic.pirate_answer(item)
