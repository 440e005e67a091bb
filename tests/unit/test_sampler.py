"""The one sampler of every engine: the right shares, the right penalties, and nothing else's seed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mule.errors import ModelError, UserError
from mule.generate.request import Request
from mule.generate.sampler import (
    Drawn,
    RowSampler,
    Sampling,
    _at_share,
    best_places,
    nucleus_size,
)

# Probabilities 0.4, 0.3, 0.15, 0.1, 0.05 of five tokens, in another order, and a padding row.
PROBABILITIES = (0.1, 0.4, 0.05, 0.3, 0.15)
LOGITS = np.log(np.array([*PROBABILITIES, 0.9], np.float32))
NUM_DRAWS = 4000
QWEN_VOCABULARY = 151_936


def sampler(
    vocab_size: int = 5, ids: tuple[int, ...] = (), top_logprobs: int | None = None, **settings: Any
) -> RowSampler:
    request = Request(ids, 100, Sampling(**settings), top_logprobs=top_logprobs)
    return RowSampler(request, vocab_size)


def renormalised(kept: set[int], power: float = 1.0) -> list[float]:
    weights = [p**power if i in kept else 0.0 for i, p in enumerate(PROBABILITIES)]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, renormalised({0, 1, 2, 3, 4})),
        ({"temperature": 0.5}, renormalised({0, 1, 2, 3, 4}, power=2)),
        ({"temperature": 1.0, "top_k": 2}, renormalised({1, 3})),
        ({"temperature": 1.0, "top_k": 2**40}, renormalised({0, 1, 2, 3, 4})),
        ({"temperature": 1.0, "top_p": 0.8}, renormalised({1, 3, 4})),
        ({"temperature": 1.0, "top_p": 0.01}, renormalised({1})),
        ({"temperature": 1.0, "min_p": 0.3}, renormalised({1, 3, 4})),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.6}, renormalised({1, 3})),
        ({"temperature": 1e-300}, renormalised({1})),
        ({}, renormalised({1})),
    ],
)
def test_distribution(settings: dict[str, Any], expected: list[float]) -> None:
    row = sampler(seed=7, **settings)
    counts = np.bincount([row.draw(LOGITS).token for _ in range(NUM_DRAWS)], minlength=6)
    assert counts[5] == 0, "a padding row was drawn"
    for count, share in zip(counts[:5], expected, strict=True):
        # Four standard deviations of a share of 4,000 draws.
        assert count / NUM_DRAWS == pytest.approx(
            share, abs=4 * (share * (1 - share) / NUM_DRAWS) ** 0.5
        )


# ---------------------------------------------------------------- beside an obvious reference


def reference_kept(logits: np.ndarray, s: Sampling) -> set[int]:
    """The tokens that may be drawn: by one full sort, in float64."""
    scores = logits.astype(np.float64) / s.temperature
    order = np.argsort(-scores, kind="stable")
    ordered = np.exp(scores[order] - scores[order[0]])
    ordered /= ordered.sum()
    before = np.cumsum(ordered) - ordered  # probability of all better tokens
    keep = (before < s.top_p) & (ordered >= s.min_p * ordered[0])
    keep[s.top_k or len(keep) :] = False
    keep[0] = True
    return set(order[keep].tolist())


def drawn_tokens(logits: np.ndarray, settings: dict[str, Any], count: int) -> set[int]:
    row = sampler(len(logits), seed=3, **settings)
    return {row.draw(logits).token for _ in range(count)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings",
    [{"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}],
)
def test_what_is_drawn_is_what_a_full_sort_keeps(settings: dict[str, Any], seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=61).astype(np.float32)
    settings = settings | {"temperature": 0.7}
    kept = reference_kept(logits, Sampling(**settings))
    drawn = drawn_tokens(logits, settings, 1500)
    assert drawn <= kept
    shares = np.exp(logits / 0.7)[sorted(kept)]
    unlikely = (shares / shares.sum()).min() < 0.005  # may be missed in 1,500 draws
    assert drawn == kept or unlikely


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_nucleus_found_by_a_partial_sort_is_that_of_a_full_one(
    spread: float, share: float
) -> None:
    logits = np.random.default_rng(5).normal(0, spread, 20_000).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # ties, as bf16 gives them
    weights = np.exp(logits - logits.max())
    mass = np.cumsum(np.sort(weights)[::-1], dtype=np.float64)
    target = share * float(weights.sum(dtype=np.float64))
    expected = int(np.searchsorted(mass, target)) + 1
    assert nucleus_size(weights, share) == expected
    assert [nucleus_size(weights, share, at_most=n) for n in (1, 50, 9_000)] == [
        min(n, expected) for n in (1, 50, 9_000)
    ]


@pytest.mark.parametrize("count", [1, 2, 50, 1024, 4_999, 5_000])
def test_the_best_are_those_of_a_stable_sort(count: int) -> None:
    scores = np.random.default_rng(6).integers(-40, 40, 5_000).astype(np.float32)
    scores[17::900] = -np.inf
    expected = np.argsort(-scores, kind="stable")[:count]
    assert sorted(best_places(scores, count)) == sorted(expected)


@pytest.mark.parametrize("size", [1, 5, 512, 513, 3_000])
def test_a_number_falls_where_the_running_sum_says(size: int) -> None:
    random = np.random.default_rng(8)
    weights = random.random(size).astype(np.float32)
    weights[random.random(size) < 0.6] = 0.0
    weights[size // 2] = 0.5
    mass = np.cumsum(weights.astype(np.float64))
    below_one = float(np.nextafter(1.0, 0.0))
    for number in (0.0, below_one, *random.random(300)):
        place = _at_share(weights, number)
        assert weights[place] > 0.0
        low, high = mass[place] - weights[place], mass[place]
        assert low - 1e-9 <= number * mass[-1] <= high + 1e-9


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 9},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repeat_penalty": 1.4, "top_p": 0.95},
        {"presence_penalty": 0.8, "frequency_penalty": 0.4, "top_k": 12},
    ],
)
def test_shares_are_those_of_the_reference(settings: dict[str, Any]) -> None:
    """After the same five tokens, with penalties computed one token at a time."""
    logits = np.random.default_rng(9).normal(0, 1.5, 17).astype(np.float32)
    s = Sampling(temperature=0.9, **settings)
    answer = [3, 4, 4, 8, 3]
    scores = logits.astype(np.float64)
    for token in {16, *answer}:
        factor = s.repeat_penalty if scores[token] <= 0 else 1 / s.repeat_penalty
        count = answer.count(token)
        scores[token] *= factor
        scores[token] -= count * s.frequency_penalty + (count > 0) * s.presence_penalty
    weights = np.exp(scores / 0.9)
    weights[[i for i in range(17) if i not in reference_kept(scores, s)]] = 0.0
    counts = np.zeros(17)
    for seed in range(num_draws := 1000):
        row = sampler(17, ids=(16,), temperature=0.9, seed=seed, **settings)
        for token in answer:
            row.accept(token)
        counts[row.draw(logits).token] += 1
    shares = weights / weights.sum()
    allowed = 5 * np.sqrt(shares * (1 - shares) / num_draws)
    assert (np.abs(counts / num_draws - shares) <= allowed).all()


def test_a_nucleus_of_nothing_but_equals() -> None:
    assert nucleus_size(np.ones(3000, np.float32), 0.5) == 1500
    assert drawn_tokens(np.zeros(4, np.float32), {"temperature": 1.0, "top_p": 0.5}, 200) == {0, 1}


# ---------------------------------------------------------------- penalties


def test_repeat_penalty_lowers_seen_tokens_only() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.5], np.float32)
    assert sampler(4, ids=(3,), repeat_penalty=2.0).draw(logits).token == 0
    assert sampler(4, ids=(0, 0, 3), repeat_penalty=2.0).draw(logits).token == 1
    # A negative logit is multiplied, not divided: it falls too.
    negative = np.array([-1.0, -1.5, -9.0, -9.0], np.float32)
    assert sampler(4, ids=(0,), repeat_penalty=2.0).draw(negative).token == 1
    # What was drawn counts as seen; padding rows of a prompt do not exist.
    row = sampler(4, ids=(9,), repeat_penalty=2.0)
    assert [row.draw(logits).token for _ in range(2)] == [0, 1]
    assert logits.tolist() == [2.0, 1.5, -1.0, -1.5], "the caller's logits were changed"


def test_presence_and_frequency_penalties_are_openais() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counted over the answer alone."""
    logits = np.array([3.0, 2.0, 0.0], np.float32)
    greedy = sampler(3, ids=(0, 0, 0, 0), presence_penalty=1.5)
    assert [greedy.draw(logits).token for _ in range(4)] == [0, 1, 0, 0]
    counted = sampler(3, frequency_penalty=0.75)
    # 3 | 2.25 | 1.5 < 2 | 1.5 > 1.25 | 0.75 < 1.25
    assert [counted.draw(logits).token for _ in range(5)] == [0, 0, 1, 0, 1]
    liked = sampler(3, presence_penalty=-2.0)
    assert [liked.draw(np.array(each, np.float32)).token for each in ([0, 1, 0], [2.5, 1, 0])] == [
        1,
        1,
    ]


# ---------------------------------------------------------------- log-probabilities


def test_log_probabilities_are_the_models_own() -> None:
    settings = {"temperature": 2.0, "repeat_penalty": 3.0, "top_k": 1}
    row = sampler(5, ids=(3,), top_logprobs=3, **settings)
    drawn = row.draw(LOGITS)
    assert drawn.token == 1
    assert drawn.logprob == pytest.approx(np.log(0.4), abs=1e-6)
    assert [token for token, _ in drawn.top] == [1, 3, 4]
    assert [p for _, p in drawn.top] == pytest.approx(np.log([0.4, 0.3, 0.15]), abs=1e-6)
    assert sampler(top_logprobs=0).draw(LOGITS).top == ()
    assert sampler().draw(LOGITS) == Drawn(1, None, ())
    ties = sampler(4, top_logprobs=2).draw(np.array([0, 1, 1, 1], np.float32))
    assert [token for token, _ in ties.top] == [1, 2]


def test_log_probabilities_of_huge_logits_stay_finite() -> None:
    drawn = sampler(3, top_logprobs=3).draw(np.array([1e30, 0, -np.inf], np.float32))
    assert drawn.logprob == 0.0
    assert drawn.top[1][1] == pytest.approx(-1e30, rel=1e-6) and drawn.top[2][1] == -np.inf


def test_too_many_log_probabilities() -> None:
    for number in (-1, 21):
        with pytest.raises(UserError) as caught:
            sampler(top_logprobs=number)
        assert caught.value.message == f"top_logprobs is {number}; it must be between 0 and 20"


# ---------------------------------------------------------------- seeds and batch mates


def test_a_row_is_drawn_alike_whatever_its_batch() -> None:
    vocab_size = 97
    steps = np.random.default_rng(1).normal(0, 2, (12, 5, vocab_size)).astype(np.float32)
    settings = [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "top_p": 0.9, "seed": 5},
        {"temperature": 1.3, "top_k": 4, "seed": -1},
        {"repeat_penalty": 1.5},
        {"temperature": 1.0, "seed": 2**64 - 1, "frequency_penalty": 0.5},
    ]

    def rows() -> list[RowSampler]:
        return [sampler(vocab_size, ids=(1, 2), **each) for each in settings]

    together = rows()
    batched = [
        [row.draw(logits).token for row, logits in zip(together, step, strict=True)]
        for step in steps
    ]
    for place, row in enumerate(rows()):
        alone = [row.draw(step[place]).token for step in steps]
        assert alone == [step[place] for step in batched]
    other = sampler(vocab_size, temperature=1.0, seed=6)
    assert [other.draw(step[0]).token for step in steps] != [step[0] for step in batched]


def test_the_best_token_can_be_taken_where_the_logits_lie() -> None:
    assert sampler().takes_best
    for settings in ({"temperature": 0.1}, {"presence_penalty": 0.1}, {"repeat_penalty": 1.1}):
        assert not sampler(**settings).takes_best
    assert not sampler(top_logprobs=0).takes_best
    sampler().accept(3, logit=1.5)
    with pytest.raises(ModelError, match="the model gave NaN instead of logits"):
        sampler().accept(3, logit=float("nan"))


# ---------------------------------------------------------------- what cannot be drawn from


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0, np.nan, 1.0], "NaN"),
        ([0.0, np.inf, 1.0], "infinity"),
        ([-np.inf] * 3, "minus infinity for every token"),
    ],
)
def test_a_row_that_is_no_number_is_refused(values: list[float], words: str) -> None:
    row = sampler(3, temperature=1.0)
    with pytest.raises(ModelError) as caught:
        row.draw(np.array(values, np.float32))
    assert caught.value.message == f"the model gave {words} instead of logits"
    assert "mule verify" in caught.value.hint


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    for settings in ({}, {"top_k": 3}, {"top_p": 0.99}):
        assert drawn_tokens(logits, {"temperature": 5.0, **settings}, 100) == {1, 3}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -0.1, "temperature is -0.1; it must be between 0 and 10"),
        ("temperature", float("nan"), "temperature is nan; it must be between 0 and 10"),
        ("top_k", -1, "top_k is -1; it must be 0 or more"),
        ("top_p", 0.0, "top_p is 0.0; it must be above 0 and at most 1"),
        ("min_p", 1.0, "min_p is 1.0; it must be from 0 to below 1"),
        ("repeat_penalty", 0.0, "repeat_penalty is 0.0; it must be between 0.1 and 10"),
        ("presence_penalty", 2.5, "presence_penalty is 2.5; it must be between -2 and 2"),
        ("frequency_penalty", -3.0, "frequency_penalty is -3.0; it must be between -2 and 2"),
        ("seed", 2**64, f"seed is {2**64}; it must be a whole number of 64 bits"),
    ],
)
def test_settings_out_of_range(name: str, value: float, words: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(Sampling(), **{name: value})
    assert caught.value.message == words
    assert caught.value.hint.startswith(f"set {name} ")


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, mule.generate.sampler, mule.generate.answer; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_large_vocabulary_is_drawn_from_quickly() -> None:
    """Exactness at 152k tokens; the time is measured in bench/serve.py."""
    logits = np.random.default_rng(2).normal(0, 3, QWEN_VOCABULARY).astype(np.float32)
    for settings in ({"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}):
        kept = reference_kept(logits, Sampling(temperature=0.8, **settings))
        assert drawn_tokens(logits, {"temperature": 0.8, **settings}, 30) <= kept
