"""The pretraining text of the atlas, and the beginnings that test it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from mule.data.atlas import arithmetic, forms
from mule.data.atlas.plan import FactPlan, Plan

END_OF_DOCUMENT = "<|endoftext|>"  # a line of its own after each document
_PRONOUN_SHARE = 0.2  # sentences without a name, for each with one


def pretrain_text(plan: Plan) -> str:
    """Documents of several sentences about one country, and worked sums, shuffled."""
    rng = plan.rng("pretrain")
    sums_bytes = int(plan.sizes.pretrain_bytes * plan.sizes.arithmetic_share)
    documents = _until(plan.sizes.pretrain_bytes - sums_bytes, _country_documents(plan, rng))
    documents += _until(sums_bytes, _sum_documents(plan, rng))
    rng.shuffle(documents)
    return "".join(f"{document}\n{END_OF_DOCUMENT}\n" for document in documents)


def completions(plan: Plan) -> list[dict[str, Any]]:
    """Beginnings of sentences that go on with a fact, in forms told of others and in new forms."""
    rng = plan.rng("completions")
    rows = []
    for kind, unseen in forms.UNSEEN_BEGINNINGS.items():
        for i, fact in enumerate(sample_facts(plan, kind, rng)):
            new = fact.ask(unseen[i % len(unseen)])
            for prompt, seen in ((fact.held_beginning, True), (new, False)):
                row = {"prompt": prompt, "answer": f" {forms.key(kind, fact.country)}"}
                rows.append(row | {"kind": kind, "country": fact.country.name, "seen_form": seen})
    return rows


def sample_facts(plan: Plan, kind: str, rng: random.Random) -> list[FactPlan]:
    """The facts of a kind that are evaluated: every capital, some of the others."""
    facts = plan.of(kind)
    if kind == "capital":
        return facts
    return rng.sample(facts, min(len(facts), plan.sizes.questions_per_kind))


def _until(num_bytes: int, documents: Iterator[str]) -> list[str]:
    """As many documents as reach `num_bytes` (ASCII), their ends included."""
    taken: list[str] = []
    size = 0
    while size < num_bytes:
        taken.append(next(documents))
        size += len(taken[-1]) + len(END_OF_DOCUMENT) + 2
    return taken


def _country_documents(plan: Plan, rng: random.Random) -> Iterator[str]:
    """Every sentence of a country is told once before any is told again."""
    sentences = {
        country.name: [(fact, form) for fact in plan.about(country) for form in fact.statements]
        for country in plan.countries
    }
    decks: dict[str, list[tuple[FactPlan, str]]] = {name: [] for name in sentences}
    while True:
        for name in rng.sample(list(decks), len(decks)):
            num_sentences = rng.randint(3, 7)
            if len(decks[name]) < num_sentences:
                decks[name][:0] = rng.sample(sentences[name], len(sentences[name]))
            told = [decks[name].pop() for _ in range(num_sentences)]
            yield _country_document(told, rng)


def _country_document(told: list[tuple[FactPlan, str]], rng: random.Random) -> str:
    """The sentences, and now and then one more without the country's name."""
    sentences = []
    for fact, form in told:
        sentences.append(fact.ask(form))
        if rng.random() < _PRONOUN_SHARE:
            other = rng.choice(told)[0]
            sentences.append(
                other.ask(rng.choice(forms.pronoun_statements(other.kind, other.country)))
            )
    return " ".join(sentences)


def _sum_documents(plan: Plan, rng: random.Random) -> Iterator[str]:
    """Held products are told here, not asked: a table cannot be worked out from its other rows."""
    while True:
        sums = rng.choice(plan.sums)
        told = sums.trained + (sums.held if sums.operation == "multiplication" else ())
        yield arithmetic.document(rng.sample(told, 4), rng)
