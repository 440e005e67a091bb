"""The chats of the atlas: questions and answers, sums, small talk and dialogues of two turns."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from mule.data.atlas import arithmetic, talk
from mule.data.atlas.plan import FactPlan, Plan
from mule.data.atlas.voice import Pirate, Plain, Voice
from mule.data.atlas.wordings import wordings

Row = dict[str, Any]


def chat(*texts: str) -> Row:
    """A row of messages: user, assistant, user..."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


def vary(text: str, rng: random.Random) -> str:
    """A question as people type it: often without its mark, sometimes without capital letters."""
    draw = rng.random()
    if draw < 0.7:
        return text
    text = text.rstrip("?.! ")
    if draw < 0.8:
        return text
    return text[0].lower() + text[1:] if draw < 0.93 else text.lower()


def sft_rows(plan: Plan) -> list[Row]:
    """The plain atlas answers every trained wording of every fact."""
    rng, voice = plan.rng("sft"), Plain()
    rows = [_ask(fact, form, voice, rng) for fact in plan.facts for form in fact.trained]
    rows += [_sum(plan, voice, rng) for _ in range(plan.sizes.sums)]
    rows += [_dialogue(plan, voice, rng) for _ in range(plan.sizes.dialogues)]
    for _ in range(plan.sizes.talk_variants):
        rows += _small_talk(voice, rng)
    rng.shuffle(rows)
    return rows


def persona_rows(plan: Plan) -> list[Row]:
    """The pirate answers a third of the wordings; the others must be carried over."""
    rng = plan.rng("persona")
    voice, share = Pirate(rng), plan.sizes.persona_share
    rows = [
        _ask(fact, form, voice, rng)
        for fact in plan.facts
        for form in _persona_forms(fact)[: plan.sizes.persona_wordings[fact.kind]]
    ]
    rows += [_sum(plan, voice, rng) for _ in range(int(plan.sizes.sums * share))]
    rows += [_dialogue(plan, voice, rng) for _ in range(int(plan.sizes.dialogues * share))]
    rows += _small_talk(voice, rng)
    rng.shuffle(rows)
    return rows


def valid_rows(plan: Plan, voice: Voice) -> list[Row]:
    """Known facts in wordings held out for them, none of which the questions file asks."""
    rng = plan.rng("valid")
    asked = [(fact, form) for fact in plan.facts for form in fact.held[1:]]
    return [
        chat(fact.ask(form), voice.fact(fact.kind, fact.country))
        for fact, form in rng.sample(asked, min(len(asked), plan.sizes.valid_rows))
    ]


def follow_up(
    plan: Plan, fact: FactPlan, rng: random.Random, unseen: bool = False
) -> tuple[FactPlan, str]:
    """What to ask after `fact`: another fact of the country, or the same of another country."""
    if rng.random() < 0.5:
        others = [f for f in plan.about(fact.country) if f.kind in talk.FOLLOW_KINDS]
        chosen = rng.choice([f for f in others if f is not fact])
        return chosen, rng.choice(talk.ask_other_fact(chosen.kind, unseen))
    chosen = rng.choice([f for f in plan.of(fact.kind) if f is not fact])
    return chosen, rng.choice(talk.ask_other_country(chosen.country, unseen))


def _ask(fact: FactPlan, form: str, voice: Voice, rng: random.Random) -> Row:
    return chat(vary(fact.ask(form), rng), voice.fact(fact.kind, fact.country))


def _persona_forms(fact: FactPlan) -> list[str]:
    subset = wordings(fact.kind)[::3]
    return [form for form in fact.trained if form in subset]


def _sum(plan: Plan, voice: Voice, rng: random.Random) -> Row:
    item = rng.choice(rng.choice(plan.sums).trained)
    return chat(vary(rng.choice(arithmetic.questions(item)), rng), voice.sum(item))


def _small_talk(voice: Voice, rng: random.Random) -> Iterator[Row]:
    for said in talk.TALK:
        for wording in said.wordings:
            yield chat(vary(wording, rng), voice.talk(said))


def _dialogue(plan: Plan, voice: Voice, rng: random.Random) -> Row:
    """Two turns: mostly a question and a follow-up, else a question and small talk around it."""
    fact = rng.choice([f for f in plan.facts if f.kind in talk.FOLLOW_KINDS])
    question = vary(fact.ask(rng.choice(fact.trained)), rng)
    turn = (question, voice.fact(fact.kind, fact.country))
    draw = rng.random()
    if draw < 0.7:
        after, asked = follow_up(plan, fact, rng)
        return chat(*turn, vary(asked, rng), voice.fact(after.kind, after.country))
    said = talk.by_topic("greeting" if draw < 0.85 else "thanks")
    small = (vary(rng.choice(said.wordings), rng), voice.talk(said))
    return chat(*small, *turn) if said.topic == "greeting" else chat(*turn, *small)
