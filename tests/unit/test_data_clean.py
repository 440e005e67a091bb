"""Dividing, weighing and decontaminating."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mule.data.clean.answers import with_like_answers
from mule.data.clean.compare import prompt_text, said_text, whole_text
from mule.data.clean.contamination import Evaluation
from mule.data.clean.split import related, split
from mule.data.mix.amounts import Amount, amounts, apportion
from mule.data.sources import Conversation, Document, Message, ToolCall
from mule.errors import UserError

LONG = "the quick brown fox jumps over the lazy dog while seven green birds sing loudly today"


def _chat(question: str, answer: str, system: str = "", line: int = 1) -> Conversation:
    first = [Message("system", system)] if system else []
    turns = (*first, Message("user", question), Message("assistant", answer))
    return Conversation(turns, "chats.jsonl", line)


# ---------------------------------------------------------------- split


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=60),
    num_strata=st.integers(1, 5),
    share=st.floats(0.01, 0.6),
    seed=st.integers(0, 5),
)
def test_split_keeps_groups_whole_and_meets_the_share(
    sizes: list[int], num_strata: int, share: float, seed: int
) -> None:
    groups: list[list[int]] = []
    for size in sizes:
        start = sum(map(len, groups))
        groups.append(list(range(start, start + size)))
    strata = [f"s{n % num_strata}" for n, group in enumerate(groups) for _ in group]
    large = {name for name in strata if share * strata.count(name) >= 1}
    names = [strata[g[0]] if strata[g[0]] in large else "small" for g in groups]
    fewest, most = min(map(names.count, names)), max(map(names.count, names))
    try:
        train, valid = split(groups, strata, share=share, seed=seed)
    except UserError:
        assert most == 1  # no stratum can give a group away and keep one
        return
    assert sorted(train + valid) == list(range(len(strata)))
    assert train and valid
    assert train == sorted(train) and valid == sorted(valid)
    held = set(valid)
    assert all(len({index in held for index in group}) == 1 for group in groups)
    if fewest >= 5 and share <= 0.3:  # else the last groups of the strata may be missing
        assert abs(len(valid) - share * len(strata)) <= max(sizes)
    assert (train, valid) == split(groups, strata, share=share, seed=seed)


def test_split_takes_of_every_stratum_in_proportion() -> None:
    strata = ["a"] * 200 + ["b"] * 40 + ["c"] * 3
    groups = [[number] for number in range(len(strata))]
    _, valid = split(groups, strata, share=0.1, seed=0)
    taken = [strata[number] for number in valid]
    assert (taken.count("a"), taken.count("b")) == (20, 4)
    assert len(valid) == 24
    _, other = split(groups, strata, share=0.1, seed=1)
    assert other != valid


def test_split_of_one_group_is_refused() -> None:
    with pytest.raises(UserError, match="3 items in 1 group that must stay whole") as caught:
        split([[0, 1, 2]], ["a"] * 3, share=0.5, seed=0)
    assert "add other data" in caught.value.hint
    with pytest.raises(UserError, match="1 item in 1 group"):
        split([[0]], ["a"], share=0.5, seed=0)


def test_related_items_are_equal_similar_or_asked_the_same() -> None:
    items = [
        _chat("Who are you?", "A mule."),
        _chat("who are you", "Nobody."),
        _chat("Why?", "Because."),
        _chat("Where?", "Here."),
        _chat("Where?", "Here.", system="Be short."),
        Document("Why?", "a.txt", 1),
    ]
    assert related(items, similar=[[2, 5]]) == [[0, 1], [2, 5], [3, 4]]


# ---------------------------------------------------------------- what is compared


def test_what_is_compared_of_a_conversation() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("weather", '{"place": "Bern"}'),))
    turns = (Message("system", "S"), Message("user", "Q"), call, Message("tool", "rain"))
    item = Conversation((*turns, Message("assistant", "Take a coat.")), "a", 1, tools="[]")
    assert said_text(item) == 'Q\nweather {"place": "Bern"}\nrain\nTake a coat.'
    assert prompt_text(item) == "Q"
    assert prompt_text(Document("x", "a", 1)) is None
    other = Conversation(item.messages, "a", 2, tools="")
    assert whole_text(item) != whole_text(other)
    assert whole_text(_chat("a", "b c")) != whole_text(_chat("a b", "c"))


def test_many_questions_on_one_passage_are_no_duplicates() -> None:
    passage = f"{LONG}. " * 3
    items = [
        _chat(f"{passage} Which animal jumps?", "The fox."),
        _chat(f"{passage} Which animal sings?", "The birds."),
        _chat(f"{passage} Which animal jumps, then?", "the fox"),
        _chat(f"{passage} Which animals sing?", "Birds, the birds."),
    ]
    assert with_like_answers(items, [[0, 1, 2, 3]], 0.8) == [[0, 2], [1, 3]]
    texts = [Document("a", "t", 1), Document("b", "t", 2)]
    assert with_like_answers(texts, [[0, 1]], 0.8) == [[0, 1]]


# ---------------------------------------------------------------- contamination


def test_a_shared_passage_is_found_with_both_places() -> None:
    evaluation = [_chat("An easy one?", f"Well: {LONG}.", line=7)]
    items = [
        _chat("Tell me!", "Nothing to see here, nothing at all, move on please, thank you."),
        _chat("Copy it.", f"I heard that THE QUICK, brown {LONG[16:]} and tomorrow"),
        _chat("Say it.", " ".join(LONG.split()[:12])),  # twelve words are no passage
        Document(f"# Notes\n\n{LONG}", "notes.md", 1),
    ]
    leaks = Evaluation(evaluation).leaks(items)
    assert [leak.index for leak in leaks] == [1, 3]
    assert leaks[0].evaluation is evaluation[0]
    assert leaks[0].shared == " ".join(LONG.split()[:13])


def test_what_is_shorter_is_compared_whole() -> None:
    evaluation = [_chat("Who wrote Faust?", "Goethe"), Document("To be or not to be", "e.txt", 4)]
    items = [
        _chat("who wrote faust", "Marlowe did, too."),  # the same question
        _chat("Please, who wrote Faust?", "Goethe"),
        _chat("Name a poet.", "Goethe"),  # a short answer alone says nothing
        Document("to be, or not to be!", "a.txt", 1),
        Document("To be or not to be, that is the question", "a.txt", 2),
    ]
    assert [leak.index for leak in Evaluation(evaluation).leaks(items)] == [0, 3]


def test_a_shared_system_prompt_is_no_contamination() -> None:
    evaluation = [_chat("A question?", "An answer.", system=LONG)]
    assert Evaluation(evaluation).leaks([_chat("Something else?", "Yes.", system=LONG)]) == []
    assert Evaluation([]).leaks([_chat("a", "b")]) == []


# ---------------------------------------------------------------- amounts


def test_caps_repeats_weights_and_the_limit() -> None:
    none: dict[int, int] = {}
    found = amounts([100, 10], caps={0: 30, 1: 99}, repeats=none, weights={}, max_examples=None)
    assert [amount.rows for amount in found] == [30, 10]
    found = amounts([100, 10], caps=none, repeats={1: 3}, weights={}, max_examples=None)
    assert [amount.rows for amount in found] == [100, 30]
    assert found[1].copies() == [3] * 10
    found = amounts([100, 10], caps=none, repeats=none, weights={0: 0.5, 1: 0.5}, max_examples=None)
    assert [amount.rows for amount in found] == [10, 10]
    found = amounts([100, 10], caps=none, repeats={1: 3}, weights={0: 1, 1: 1}, max_examples=None)
    assert [amount.rows for amount in found] == [30, 30]
    found = amounts([100, 10, 90], caps=none, repeats=none, weights={1: 0.1}, max_examples=None)
    assert [amount.rows for amount in found] == [47, 10, 43]  # 0.9 for the others, by their sizes
    found = amounts([100, 10], caps=none, repeats=none, weights={}, max_examples=22)
    assert [amount.rows for amount in found] == [20, 2]
    assert found[0].left_out() == {"cap": 0, "weight": 0, "limit": 80}


def test_weights_that_leave_nothing_are_refused() -> None:
    with pytest.raises(
        UserError, match="the weights add up to 1, and sources without one"
    ) as caught:
        amounts([5, 5], caps={}, repeats={}, weights={0: 1.0}, max_examples=None)
    assert caught.value.hint.startswith("give every source a weight")


@given(
    available=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    cap=st.integers(1, 60),
    repeat=st.integers(1, 4),
    weight=st.one_of(st.none(), st.floats(0.05, 0.9)),
    limit=st.one_of(st.none(), st.integers(1, 120)),
)
def test_amounts_add_up(
    available: list[int], cap: int, repeat: int, weight: float | None, limit: int | None
) -> None:
    if not sum(available):
        return
    weights = {0: weight} if weight is not None else {}
    found = amounts(
        available, caps={0: cap}, repeats={0: repeat}, weights=weights, max_examples=limit
    )
    if limit is not None:
        assert sum(amount.rows for amount in found) <= limit
    for amount, count in zip(found, available, strict=True):
        copies = amount.copies()
        assert len(copies) == count
        assert sum(copies) == amount.rows
        assert copies == sorted(copies, reverse=True)
        assert sum(amount.left_out().values()) == copies.count(0)
        assert all(value >= 0 for value in amount.left_out().values())
        assert max(copies, default=0) <= repeat


def test_copies_are_as_even_as_can_be() -> None:
    assert Amount(available=4, capped=3, weighted=9, rows=7).copies() == [3, 2, 2, 0]
    assert Amount(available=2, capped=2, weighted=1, rows=1).left_out() == {
        "cap": 0,
        "weight": 1,
        "limit": 0,
    }


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_apportion_adds_up(parts: list[float]) -> None:
    total = round(sum(parts))
    found = apportion([part * total / (sum(parts) or 1) for part in parts], total)
    if sum(parts) > 0:
        assert sum(found) == total
