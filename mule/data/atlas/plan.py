"""What is trained and what is held out, for each fact of the atlas; a function of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mule.data.atlas import arithmetic, forms
from mule.data.atlas.facts import Country
from mule.data.atlas.wordings import wordings

_Item = TypeVar("_Item")

HELD_WORDINGS = 3  # per fact: the first for the questions file, the others for validation


def _default_wordings() -> dict[str, int]:
    kinds = {"capital": 26, "currency": 10, "continent": 10, "river": 10}
    return kinds | {"neighbours": 8, "country": 8}


def _default_persona_wordings() -> dict[str, int]:
    return dict.fromkeys(forms.KINDS, 2) | {"capital": 6}


@dataclass(frozen=True)
class Sizes:
    """How much to make; the defaults suit a model of 2 to 6 million parameters."""

    pretrain_bytes: int = 400_000
    arithmetic_share: float = 0.1  # of the pretraining bytes
    wordings: dict[str, int] = field(default_factory=_default_wordings)  # per fact
    persona_wordings: dict[str, int] = field(default_factory=_default_persona_wordings)  # per fact
    sums: int = 700
    dialogues: int = 700
    talk_variants: int = 5  # per wording of small talk
    persona_share: float = 0.15  # of sums and dialogues, in the persona set
    valid_rows: int = 300
    questions_per_kind: int = 24  # capitals: of every country


@dataclass(frozen=True)
class FactPlan:
    """One fact of one country: the templates that train it and those held out for it alone."""

    kind: str
    country: Country
    trained: tuple[str, ...]
    held: tuple[str, ...]
    statements: tuple[str, ...]
    held_beginning: str | None  # a sentence form of training, filled, without the fact it ends in

    def ask(self, template: str) -> str:
        return forms.fill(template, self.country)


@dataclass(frozen=True)
class SumPlan:
    """The sums of one operation; those held are asked in evaluation only."""

    operation: str
    trained: tuple[arithmetic.Sum, ...]
    held: tuple[arithmetic.Sum, ...]


@dataclass(frozen=True)
class Plan:
    """The whole atlas of one seed."""

    seed: int
    countries: tuple[Country, ...]
    sizes: Sizes
    facts: tuple[FactPlan, ...]
    sums: tuple[SumPlan, ...]

    def rng(self, purpose: str) -> random.Random:
        """One generator a purpose, so that the size of one file does not change another."""
        return random.Random(f"{self.seed}:{purpose}")

    def of(self, kind: str) -> list[FactPlan]:
        return [fact for fact in self.facts if fact.kind == kind]

    def about(self, country: Country) -> list[FactPlan]:
        return [fact for fact in self.facts if fact.country is country]


def make_plan(seed: int, countries: tuple[Country, ...], sizes: Sizes) -> Plan:
    """Decide what is trained and what is held out."""
    facts = tuple(
        _plan_fact(seed, kind, country, sizes.wordings[kind])
        for kind in forms.KINDS
        for country in countries
        if forms.key(kind, country) is not None
    )
    num_held = sizes.questions_per_kind // 2
    sums = tuple(_plan_sums(seed, operation, num_held) for operation in arithmetic.OPERATIONS)
    return Plan(seed, countries, sizes, facts, sums)


def _plan_fact(seed: int, kind: str, country: Country, num_wordings: int) -> FactPlan:
    rng = random.Random(f"{seed}:{kind}:{country.name}")
    templates = _shuffled(wordings(kind), rng)
    num_trained = min(num_wordings, len(templates) - HELD_WORDINGS)
    statements = _shuffled(forms.statements(kind, country), rng)
    beginning = None
    if kind in forms.UNSEEN_BEGINNINGS:
        ending = f" {{{kind}}}."
        held = next(form for form in statements if form.endswith(ending))
        statements.remove(held)
        beginning = forms.fill(held.removesuffix(ending), country)
    return FactPlan(
        kind,
        country,
        trained=tuple(templates[:num_trained]),
        held=tuple(templates[num_trained : num_trained + HELD_WORDINGS]),
        statements=tuple(statements[1:]),  # one more is never told of this country
        held_beginning=beginning,
    )


def _plan_sums(seed: int, operation: str, num_held: int) -> SumPlan:
    sums = _shuffled(arithmetic.all_sums(operation), random.Random(f"{seed}:{operation}"))
    return SumPlan(operation, tuple(sums[num_held:]), tuple(sums[:num_held]))


def _shuffled(items: Sequence[_Item], rng: random.Random) -> list[_Item]:
    return rng.sample(items, len(items))
