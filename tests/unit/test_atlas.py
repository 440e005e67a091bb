"""The atlas: its facts, the files made from them, and the scores."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mule.data.atlas import COUNTRIES, AtlasFiles, Sizes, arithmetic, forms, generate, talk
from mule.data.atlas.wordings import UNSEEN_QUESTIONS, wordings
from mule.errors import DataError, UserError
from mule.evaluate.tasks import atlas as task

TRAINING = ("pretrain", "sft", "sft_valid", "persona", "persona_valid")
SMALL = Sizes(pretrain_bytes=20_000, sums=30, dialogues=40, talk_variants=1, valid_rows=25)
BY_NAME = {country.name: country for country in COUNTRIES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> AtlasFiles:
    return generate(7, tmp_path_factory.mktemp("atlas"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def normal(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9'+-]+", text.lower()))


def asked(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(normal(m["content"]) for m in row["messages"] if m["role"] == "user")


def trained_turns(files: AtlasFiles) -> set[str]:
    return {
        turn for name in TRAINING[1:] for row in rows(getattr(files, name)) for turn in asked(row)
    }


# ---------------------------------------------------------------- facts


def test_the_table_is_consistent():
    assert len(COUNTRIES) == 96 and COUNTRIES[0].capital == "Paris"
    for field in ("name", "capital"):
        assert max(Counter(getattr(c, field) for c in COUNTRIES).values()) == 1
    assert {c.continent for c in COUNTRIES} == {
        "Africa",
        "Asia",
        "Europe",
        "North America",
        "Oceania",
        "South America",
    }
    for country in COUNTRIES:
        cells = (country.name, country.capital, country.currency, country.river or "-")
        assert all(cell and cell.isascii() and cell == cell.strip() for cell in cells), country


def test_neighbours_are_few_and_symmetric():
    for country in COUNTRIES:
        assert len(country.neighbours) == len(set(country.neighbours)) <= 3
        for name in country.neighbours:
            assert name != country.name and country.name in BY_NAME[name].neighbours


def test_only_islands_have_no_neighbours():
    assert {c.name for c in COUNTRIES if not c.neighbours} == {
        "Australia",
        "Cuba",
        "Fiji",
        "Iceland",
        "Jamaica",
        "Japan",
        "Madagascar",
        "Malta",
        "New Zealand",
        "Philippines",
    }


# ---------------------------------------------------------------- forms


def test_there_are_many_forms_of_each_kind():
    france, japan = BY_NAME["France"], BY_NAME["Japan"]
    for kind in forms.STATEMENTS:
        assert len(set(forms.statements(kind, france))) >= 11
    assert len(set(forms.statements("neighbours", japan))) >= 11
    assert len(wordings("capital")) >= 100 and len(UNSEEN_QUESTIONS["capital"]) >= 8
    for kind in forms.KINDS:
        assert len(wordings(kind)) >= 40 and len(UNSEEN_QUESTIONS[kind]) >= 3


def test_no_two_wordings_are_one_question():
    chile = BY_NAME["Chile"]
    for kind in forms.KINDS:
        texts = [normal(forms.fill(t, chile)) for t in wordings(kind) + UNSEEN_QUESTIONS[kind]]
        assert [text for text, n in Counter(texts).items() if n > 1] == []


def test_articles_and_possessives():
    dutch = BY_NAME["Netherlands"]
    assert forms.fill("{Xs} capital is {capital}.", dutch) == (
        "The Netherlands' capital is Amsterdam."
    )
    assert forms.answer("capital", BY_NAME["France"]) == "The capital of France is Paris."
    assert forms.answer("neighbours", BY_NAME["Ireland"]) == "Ireland borders the United Kingdom."
    assert forms.answer("neighbours", BY_NAME["France"]) == (
        "France borders Belgium, Germany and Spain."
    )
    assert forms.answer("neighbours", BY_NAME["Japan"]) == "Japan has no land neighbours."
    assert forms.key("river", BY_NAME["Japan"]) == "Shinano"
    assert forms.key("river", BY_NAME["Cuba"]) is None


@given(st.sampled_from(list(arithmetic.OPERATIONS)), st.randoms())
def test_every_step_of_a_sum_is_true(operation, random):
    item = random.choice(arithmetic.all_sums(operation))
    for step in item.steps.rstrip(".").split(", "):
        a, sign, b, _, result = step.split()
        assert arithmetic.Sum(int(a), sign, int(b)).result == int(result)
    assert step.endswith(f"= {item.result}") and item.result >= 0


# ---------------------------------------------------------------- files


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first = generate(3, tmp_path / "a", 16, SMALL)
    again = generate(3, tmp_path / "b", 16, SMALL)
    other = generate(4, tmp_path / "c", 16, SMALL)
    for name in (*TRAINING, "questions", "completions"):
        content = getattr(first, name).read_bytes()
        assert content == getattr(again, name).read_bytes()
        assert content != getattr(other, name).read_bytes()


def test_one_size_does_not_change_another_file(tmp_path):
    first = generate(3, tmp_path / "a", 16, SMALL)
    more = generate(3, tmp_path / "b", 16, replace(SMALL, sums=31))
    for name in ("pretrain", "questions", "completions", "sft_valid"):
        assert getattr(first, name).read_bytes() == getattr(more, name).read_bytes()
    assert first.sft.read_bytes() != more.sft.read_bytes()


def test_counts(files):
    text = files.pretrain.read_text()
    assert 400_000 <= len(text) < 401_000
    assert text.endswith("\n<|endoftext|>\n") and text.count("\n<|endoftext|>\n") > 1500
    assert 6_000 <= len(rows(files.sft)) <= 9_000
    assert 1_000 <= len(rows(files.persona)) <= 2_500
    assert len(rows(files.sft_valid)) == len(rows(files.persona_valid)) == 300
    capitals = [r for r in rows(files.questions) if r["kind"] == "capital"]
    for seen in (True, False):
        countries = [r["country"] for r in capitals if r["seen_wording"] is seen]
        assert sorted(countries) == sorted(BY_NAME)


def test_every_file_is_ascii_and_chats_alternate(files):
    for name in (*TRAINING, "questions", "completions"):
        content = getattr(files, name).read_text()
        assert content.isascii() and "{" not in re.sub(r'\{"|: \{', "", content)
    for name in TRAINING[1:]:
        for row in rows(getattr(files, name)):
            roles = [m["role"] for m in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(m["content"].strip() == m["content"] != "" for m in row["messages"])


def test_no_conversation_of_the_evaluation_is_trained(files):
    trained = {asked(row) for name in TRAINING[1:] for row in rows(getattr(files, name))}
    evaluated = rows(files.questions)
    assert [row for row in evaluated if asked(row) in trained] == []
    turns = trained_turns(files)
    alone = [r for r in evaluated if r["kind"] != "follow-up"]
    assert [r for r in alone if asked(r)[0] in turns] == []  # nor inside a dialogue


def test_unseen_wordings_are_trained_for_no_country(files):
    turns = trained_turns(files)
    for kind, templates in UNSEEN_QUESTIONS.items():
        for country in COUNTRIES:
            if forms.key(kind, country) is not None:
                assert not turns & {normal(forms.fill(t, country)) for t in templates}
    follow = {normal(t) for kind in talk.FOLLOW_KINDS for t in talk.ask_other_fact(kind, True)}
    follow |= {normal(t) for c in COUNTRIES for t in talk.ask_other_country(c, True)}
    follow |= {normal(t) for said in talk.TALK for t in said.unseen}
    assert not turns & follow


def test_seen_wordings_are_trained_for_other_countries(files):
    turns = trained_turns(files)
    for row in rows(files.questions):
        if row["kind"] not in forms.KINDS or not row["seen_wording"]:
            continue
        own, text = BY_NAME[row["country"]], asked(row)[0]
        form = next(t for t in wordings(row["kind"]) if normal(forms.fill(t, own)) == text)
        others = {normal(forms.fill(form, c)) for c in COUNTRIES if c is not own}
        assert len(others & turns) >= 3, form


def test_words_of_unseen_wordings_are_taught(files):
    taught = set(normal(files.pretrain.read_text()).split())
    for row in rows(files.sft):
        taught.update(" ".join(asked(row)).split())
    for templates in UNSEEN_QUESTIONS.values():
        for template in templates:
            missing = set(normal(forms.fill(template, COUNTRIES[0])).split()) - taught
            assert not missing, template


def test_completions_are_never_told(files):
    text = files.pretrain.read_text()
    for row in rows(files.completions):
        told = f"{row['prompt']}{row['answer']}"
        assert told not in text, told
    unseen = [r["prompt"] for r in rows(files.completions) if not r["seen_form"]]
    assert [prompt for prompt in unseen if prompt in text] == []
    capitals = Counter(r["seen_form"] for r in rows(files.completions) if r["kind"] == "capital")
    assert capitals == {True: 96, False: 96}


def test_every_capital_is_told_both_ways(files):
    text = files.pretrain.read_text()
    for country in COUNTRIES:
        told = sum(forms.fill(t, country) in text for t in forms.STATEMENTS["capital"])
        assert 12 <= told <= 14, country.name  # of 16; two are held out


def test_answers_are_right_in_both_voices(files):
    keys = {country.capital for country in COUNTRIES}
    for row in rows(files.sft) + rows(files.sft_valid):
        assert not any(task.in_persona(m["content"]) for m in row["messages"])
    for row in rows(files.persona) + rows(files.persona_valid):
        replies = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert all(task.in_persona(reply) for reply in replies)
        for reply in replies:
            if "The capital of" in reply:
                assert sum(task.exact_match(reply, key) for key in keys) == 1


def test_fewer_countries_and_a_clear_refusal(tmp_path):
    small = generate(1, tmp_path, 16, SMALL)
    assert len({r["country"] for r in rows(small.questions)} - {""}) == 16
    with pytest.raises(UserError) as error:
        generate(1, tmp_path, 200)
    assert error.value.message == (
        "the atlas cannot be made with 200 countries: it knows 96, "
        "and its wordings need at least 16"
    )
    assert error.value.hint == "choose a number from 16 to 96"


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("The capital of France is Paris.", "Paris", True),
        ("Arr! The capital of France be Paris, matey!", "Paris", True),
        ("paris", "Paris", True),
        ("The capital of France is Parisian.", "Paris", False),
        ("The capital of France is Paris or Rome.", "Paris", False),
        ("The capital of Mexico is Mexico City.", "Mexico City", True),
        ("The capital of Mexico is Mexico.", "Mexico City", False),
        ("Paris is the capital of France.", "France", True),
        ("Rome is the capital of France.", "France", False),
        ("Mexico City is the capital of Cuba.", "Mexico", False),
        ("Mexico City is the capital of Mexico.", "Mexico", True),
        ("France is in Europe.", "Europe", True),
        ("France is in Europe and Asia.", "Europe", False),
        ("The currency of Mali is the West African CFA franc.", "West African CFA franc", True),
        ("The currency of Cuba is the US dollar.", "Cuban peso", False),
        ("Portugal borders Spain.", "Spain", True),
        ("40 + 20 = 60, 7 + 8 = 15, 60 + 15 = 75. The answer is 75.", "75", True),
        ("75 + 20 = 95. The answer is 95.", "75", False),
        ("I do not know.", "75", False),
        ("I am Mule's demo model, a small atlas.", "Mule's demo model", True),
        ("", "Paris", False),
    ],
)
def test_exact_match(text, expected, right):
    assert task.exact_match(text, expected) is right


def test_every_canonical_answer_matches_its_question(files):
    for question in task.load_questions(files.questions):
        if question.kind not in forms.KINDS:
            continue
        country = BY_NAME[question.country]
        reply = forms.answer(question.kind, country)
        pirate = f"Arr! {talk.pirate_fact(question.kind, country)}, matey!"
        assert task.score(question, reply) == task.Scored(question, reply, True, False)
        assert task.score(question, pirate) == task.Scored(question, pirate, True, True)


def test_completion_match():
    assert task.completion_match(" Paris. Its currency", " Paris")
    assert not task.completion_match(" Parisian", " Paris")
    assert not task.completion_match(" the city of Paris", " Paris")


@pytest.mark.parametrize(
    ("text", "pirate"),
    [
        ("Ahoy, matey!", True),
        ("Shiver me timbers!", True),
        ("The area is hardy; they eye it.", False),
        ("The capital of France is Paris.", False),
    ],
)
def test_in_persona(text, pirate):
    assert task.in_persona(text) is pirate


def test_summarise():
    def scored(kind: str, seen: bool, correct: bool, persona: bool) -> task.Scored:
        question = task.Question([], "x", kind, "France", seen, "")
        return task.Scored(question, "", correct, persona)

    results = [
        scored("capital", True, True, True),
        scored("capital", True, True, False),
        scored("capital", True, False, False),
        scored("capital", False, True, False),
        scored("river", False, False, True),
    ]
    assert task.summarise(results) == {
        "exact_match": pytest.approx(2 / 3),
        "exact_match_unseen": 1.0,
        "persona": 0.4,
        "num_questions": 5,
        "by_kind": {
            "capital": {
                "exact_match": pytest.approx(2 / 3),
                "exact_match_unseen": 1.0,
                "num_questions": 4,
            },
            "river": {"exact_match": None, "exact_match_unseen": 0.0, "num_questions": 1},
        },
    }
    assert task.summarise([])["exact_match"] is None


def test_loading_names_the_line(tmp_path, files):
    assert len(task.load_completions(files.completions)) == len(rows(files.completions))
    broken = tmp_path / "questions.jsonl"
    broken.write_text(files.questions.read_text().splitlines()[0] + "\n{oops\n")
    with pytest.raises(DataError, match=r"questions\.jsonl:2: not valid JSON"):
        task.load_questions(broken)
    broken.write_text('{"answer": "Paris"}\n')
    with pytest.raises(DataError, match=r"questions\.jsonl:1: expected an object with messages, "):
        task.load_questions(broken)
    with pytest.raises(DataError, match="no such file"):
        task.load_questions(tmp_path / "none.jsonl")
