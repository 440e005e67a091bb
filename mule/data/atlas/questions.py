"""The questions that evaluate the atlas; none of these conversations is in a training file."""

from __future__ import annotations

import random

from mule.data.atlas import arithmetic, forms, talk
from mule.data.atlas.chats import Row, chat, follow_up
from mule.data.atlas.corpus import sample_facts
from mule.data.atlas.plan import FactPlan, Plan
from mule.data.atlas.wordings import UNSEEN_QUESTIONS


def questions(plan: Plan) -> list[Row]:
    """Each fact once in a trained wording held out for it, and once in a wording never trained."""
    rng = plan.rng("questions")
    rows = []
    for kind in forms.KINDS:
        for i, fact in enumerate(sample_facts(plan, kind, rng)):
            new = UNSEEN_QUESTIONS[kind]
            rows.append(_fact_row(fact, chat(fact.ask(fact.held[0])), kind, seen=True))
            rows.append(_fact_row(fact, chat(fact.ask(new[i % len(new)])), kind, seen=False))
    return rows + _follow_ups(plan, rng) + _sums(plan, rng) + _small_talk()


def _follow_ups(plan: Plan, rng: random.Random) -> list[Row]:
    rows = []
    firsts = [fact for fact in plan.facts if fact.kind in talk.FOLLOW_KINDS]
    for i, fact in enumerate(rng.sample(firsts, plan.sizes.questions_per_kind)):
        seen = i % 2 == 0
        after, asked = follow_up(plan, fact, rng, unseen=not seen)
        said = chat(fact.ask(fact.held[0]), forms.answer(fact.kind, fact.country), asked)
        rows.append(_fact_row(after, said, "follow-up", seen))
    return rows


def _sums(plan: Plan, rng: random.Random) -> list[Row]:
    rows = []
    for sums in plan.sums:
        for i, item in enumerate(sums.held):
            seen = i % 2 == 0
            asked = rng.choice(arithmetic.questions(item, unseen=not seen))
            rows.append(_row(chat(asked), str(item.result), sums.operation, seen))
    return rows


def _small_talk() -> list[Row]:
    return [
        _row(chat(wording), said.key, said.topic, seen=False)
        for said in talk.TALK
        for wording in said.unseen
    ]


def _fact_row(fact: FactPlan, said: Row, kind: str, seen: bool) -> Row:
    answer = forms.key(fact.kind, fact.country)
    assert answer is not None  # facts that do not apply are not planned
    return _row(said, answer, kind, seen) | {"country": fact.country.name}


def _row(said: Row, answer: str, kind: str, seen: bool) -> Row:
    split = "held-out pair" if seen else "held-out wording"
    evaluated = {"answer": answer, "kind": kind, "country": "", "seen_wording": seen}
    return said | evaluated | {"split": split}
