"""Exact and near-duplicates: groups, recall, precision, scripts, and what must not explode."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import near_duplicates as bench
from mule.data.clean.exact import duplicates
from mule.data.clean.groups import Groups
from mule.data.clean.near import bands, near_duplicates
from mule.data.clean.shingles import Shingler, words
from mule.errors import UserError

VOCABULARY = [f"word{number}" for number in range(3000)]
BOOKS = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def _text(draw: random.Random, num_words: int = 150) -> list[str]:
    return draw.choices(VOCABULARY, k=num_words)


def _replaced(text: list[str], count: int, draw: random.Random) -> list[str]:
    """The text with `count` of its words replaced, ten words apart."""
    found = list(text)
    for place in range(count):
        found[10 * place + 5] = f"other{draw.randrange(10**12)}"
    return found


# ---------------------------------------------------------------- exact


def test_equal_but_for_white_space() -> None:
    texts = ["a b", "c", " a\n\tb ", "A b", "a b.", "a b"]
    assert duplicates(texts) == [[0, 2, 5]]
    assert duplicates([]) == []
    assert duplicates(["", " \n", "x"]) == [[0, 1]]


# ---------------------------------------------------------------- union-find


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29))))
def test_groups_are_the_connected_components(size: int, pairs: list[tuple[int, int]]) -> None:
    groups = Groups(size)
    components = [{number} for number in range(size)]
    for a, b in ((a % size, b % size) for a, b in pairs):
        groups.join(a, b)
        one = next(part for part in components if a in part)
        other = next(part for part in components if b in part)
        if one is not other:
            components.remove(other)
            one |= other
    assert groups.members() == sorted(sorted(part) for part in components)
    roots = groups.find_all(np.arange(size)).tolist()
    assert roots == [min(next(c for c in components if n in c)) for n in range(size)]
    assert [groups.find(number) for number in range(size)] == roots
    assert groups.members(at_least=2) == [part for part in groups.members() if len(part) > 1]


# ---------------------------------------------------------------- words and shingles


def test_words_are_lower_case_without_punctuation() -> None:
    assert words("Don't  panic, Mr. É!") == ["don", "t", "panic", "mr", "é"]
    assert words("3 + 4 = $7.") == ["3", "4", "7"]
    assert words("3 + 4 = $7.", symbols=True) == ["3", "+", "4", "=", "$", "7"]
    assert words("naïve – 3−4 + 4", symbols=True) == ["naïve", "3", "4", "+", "4"]


def test_scripts_without_spaces_count_characters() -> None:
    assert words("你好 world") == ["你", "好", "world"]
    assert words("カタカナ") == list("カタカナ")
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]  # vowel signs belong to the word


@settings(max_examples=60)
@given(st.lists(st.text("ab cd,é你", max_size=30), min_size=1, max_size=8), st.integers(1, 4))
def test_shingles_are_those_of_the_definition(texts: list[str], length: int) -> None:
    """Equal hashes exactly where the runs of words are equal."""
    seen: dict[int, tuple[str, ...]] = {}
    sets = Shingler(length).sets(texts)
    for text, hashes in zip(texts, sets, strict=True):
        found = words(text) or [text.strip()]
        last = max(1, len(found) - length + 1)
        runs = {tuple(found[start : start + length]) for start in range(last)}
        assert len(hashes) == len(runs)
        for run in runs:
            alone = Shingler(length).sets([" ".join(run)])[0]
            assert alone.size == 1
            assert seen.setdefault(int(alone[0]), run) == run
        assert {seen[int(value)] for value in hashes} == runs


# ---------------------------------------------------------------- near


def test_pairs_above_the_threshold_are_found_and_no_other() -> None:
    draw = random.Random(3)
    texts: list[str] = []
    for _ in range(200):
        original = _text(draw)
        texts += [" ".join(original), " ".join(_replaced(original, 3, draw))]  # J = 131/161 = 0.81
    assert near_duplicates(texts) == [[2 * n, 2 * n + 1] for n in range(200)]
    draw = random.Random(4)
    texts = []
    for _ in range(200):
        original = _text(draw)
        texts += [" ".join(original), " ".join(_replaced(original, 4, draw))]  # 126/166 = 0.76
    assert near_duplicates(texts) == []
    assert len(near_duplicates(texts, threshold=0.75)) > 195


def test_recall_and_precision_on_planted_copies() -> None:
    draw = random.Random(5)
    originals = [_text(draw) for _ in range(1500)]
    copies = [_replaced(text, draw.randrange(0, 8), draw) for text in originals]
    texts = [" ".join(text) for text in originals + copies]
    groups = near_duplicates(texts)
    pairs = [(n, n + 1500) for n in range(1500)]
    figures = bench.judge(texts, pairs, groups)
    assert figures["planted_pairs_at_threshold"] > 400
    assert figures["recall"] >= 0.99
    assert figures["precision"] == 1.0


def test_the_bands_keep_the_wanted_recall() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.99):
        number, rows = bands(threshold)
        assert number * rows <= 128
        assert 1 - (1 - threshold**rows) ** number >= 0.99
    assert bands(0.8) == (21, 6)
    assert bands(1.0) == (1, 128)


def test_the_seed_decides_and_threshold_one_means_the_same_words() -> None:
    draw = random.Random(6)
    texts = [" ".join(_replaced(_text(random.Random(n % 40)), n % 7, draw)) for n in range(120)]
    assert near_duplicates(texts, seed=9) == near_duplicates(texts, seed=9)
    same_words = ["One two three, four five SIX!", "one two three four five six", "six five four"]
    assert near_duplicates(same_words, threshold=1.0) == [[0, 1]]


def test_short_texts_are_alike_only_with_the_same_words() -> None:
    assert near_duplicates(["Hi!", "hi", "What is 3 + 4?", "What is 3 - 4?", "?", "!"]) == [[0, 1]]
    assert near_duplicates([]) == []
    assert near_duplicates(["alone"]) == []
    assert near_duplicates(["", " ", ""]) == [[0, 1, 2]]


def test_chinese_without_spaces() -> None:
    text = "今天天气很好我们一起去公园散步吧然后再去吃饭看电影听音乐最后回家睡觉明天还要上班工作"
    assert near_duplicates([text, text[:-1] + "呢", text[::-1]]) == [[0, 1]]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01])
def test_a_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(UserError, match="the threshold of near-duplicates is") as caught:
        near_duplicates(["a"], threshold=threshold)
    assert caught.value.hint == "give one above 0, at most 1"


@pytest.mark.parametrize("num_replaced", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_thousands_alike_are_not_compared_pairwise(num_replaced: int) -> None:
    """All from one template: equal, alike, or all in the same buckets and not alike."""
    draw = random.Random(7)
    template = _text(draw, 100)
    texts = [" ".join(_replaced(template, num_replaced, draw)) for _ in range(4000)]
    started_at = time.process_time()
    groups = near_duplicates(texts)
    assert time.process_time() - started_at < 20  # 8 million exact comparisons take minutes
    assert groups == ([] if num_replaced == 3 else [list(range(4000))])


@pytest.mark.shared
@pytest.mark.skipif(not (BOOKS / "books-en").is_dir(), reason="needs the development data")
def test_the_benchmark_on_few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, pairs = bench.make_texts(BOOKS, 2000, seed=1)
    assert len(texts) == 2000
    assert len(pairs) == 400
    figures = bench.judge(texts, pairs, near_duplicates(texts))
    assert figures["recall"] >= 0.99
    assert figures["precision"] == 1.0
    assert sum(part["pairs"] for part in figures["joined_by_jaccard"].values()) > 380
