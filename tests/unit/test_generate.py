"""Sampling and generation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mule.errors import UserError
from mule.generate.engine import greedy_answers, stream
from mule.generate.sampler import Sampler, Sampling
from tests.tiny import TINY, tiny_model

# Probabilities 0.4, 0.3, 0.15, 0.1, 0.05 of five tokens, in another order, and a padding row.
PROBABILITIES = (0.1, 0.4, 0.05, 0.3, 0.15)
LOGITS = torch.tensor([[*PROBABILITIES, 0.9]]).log()
NUM_DRAWS = 4000


def shares(sampling: Sampling) -> list[float]:
    """How often each token is drawn."""
    sampler = Sampler(sampling, vocab_size=5)
    seen = torch.zeros(NUM_DRAWS, 1, dtype=torch.long)
    drawn = sampler.draw(LOGITS.expand(NUM_DRAWS, -1), seen)
    assert drawn.shape == (NUM_DRAWS, 1)
    counts = torch.bincount(drawn.flatten(), minlength=6)
    assert counts[5] == 0, "a padding row was drawn"
    return (counts[:5] / NUM_DRAWS).tolist()


def renormalised(kept: set[int], power: float = 1.0) -> list[float]:
    weights = [p**power if i in kept else 0.0 for i, p in enumerate(PROBABILITIES)]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), renormalised({0, 1, 2, 3, 4})),
        (Sampling(temperature=0.5), renormalised({0, 1, 2, 3, 4}, power=2)),
        (Sampling(temperature=1.0, top_k=2), renormalised({1, 3})),
        (Sampling(temperature=1.0, top_p=0.8), renormalised({1, 3, 4})),
        (Sampling(temperature=1.0, top_p=0.01), renormalised({1})),
        (Sampling(temperature=1.0, min_p=0.3), renormalised({1, 3, 4})),
        (Sampling(temperature=1.0, top_k=3, top_p=0.6), renormalised({1, 3})),
        (Sampling(), renormalised({1})),
    ],
)
def test_distribution(sampling: Sampling, expected: list[float]) -> None:
    for found, share in zip(shares(sampling), expected, strict=True):
        # Four standard deviations of a share of 4,000 draws.
        assert found == pytest.approx(share, abs=4 * (share * (1 - share) / NUM_DRAWS) ** 0.5)


def test_repeat_penalty_lowers_seen_tokens_only() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    sampler = Sampler(Sampling(repeat_penalty=2.0), 4)
    assert int(sampler.draw(logits, torch.tensor([[3]]))) == 0
    assert int(sampler.draw(logits, torch.tensor([[0, 0, 3]]))) == 1
    # A negative logit is multiplied, not divided: it falls too.
    negative = torch.tensor([[-1.0, -1.5, -9.0, -9.0]])
    assert int(sampler.draw(negative, torch.tensor([[0]]))) == 1


def test_a_seed_decides() -> None:
    settings = Sampling(temperature=1.0, seed=5)
    draws = []
    for sampling in (settings, settings, dataclasses.replace(settings, seed=6)):
        sampler = Sampler(sampling, 5)
        seen = torch.zeros(1, 1, dtype=torch.long)
        draws.append([int(sampler.draw(LOGITS, seen)) for _ in range(40)])
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -0.1, "temperature is -0.1; it must be between 0 and 10"),
        ("top_k", -1, "top_k is -1; it must be 0 or more"),
        ("top_p", 0.0, "top_p is 0.0; it must be above 0 and at most 1"),
        ("min_p", 1.0, "min_p is 1.0; it must be from 0 to below 1"),
        ("repeat_penalty", 0.0, "repeat_penalty is 0.0; it must be between 0.1 and 10"),
    ],
)
def test_settings_out_of_range(name: str, value: float, words: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(Sampling(), **{name: value})
    assert caught.value.message == words
    assert caught.value.hint.startswith(f"set {name} ")


# ---------------------------------------------------------------- the engine


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, 80, (length,), generator=generator).tolist()
        for length in (3, 7, 3, 5, 7, 3)
    ]


def test_many_prompts_are_answered_as_one_by_one() -> None:
    model = tiny_model().eval()
    settings = {"max_tokens": 11, "vocab_size": 83}
    alone = [list(stream(model, prompt, stop_ids=(), **settings)) for prompt in prompts()]
    stop = alone[1][4]
    expected = [list(stream(model, prompt, stop_ids=(stop,), **settings)) for prompt in prompts()]
    assert len({len(answer) for answer in expected}) > 1, "the stop token must cut some"
    for batch_size in (64, 2):
        found = greedy_answers(
            model, prompts(), stop_ids=(stop,), batch_size=batch_size, **settings
        )
        assert found == expected


def test_generation_stops_before_the_stop_token() -> None:
    model = tiny_model().eval()
    [prompt, *_] = prompts()
    free = list(stream(model, prompt, max_tokens=9, stop_ids=()))
    assert len(free) == 9
    stop = free[-1]
    cut = free[: free.index(stop)]
    assert list(stream(model, prompt, max_tokens=9, stop_ids=(88, stop))) == cut
    assert greedy_answers(model, [prompt], max_tokens=9, stop_ids=(88, stop)) == [cut]


def test_cached_generation_equals_full_forward() -> None:
    model = tiny_model().eval()
    ids = prompts()[3]
    for token in stream(model, ids, max_tokens=8, stop_ids=()):
        with torch.no_grad():
            assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids = [*ids, token]


def test_a_full_context_ends_the_answer() -> None:
    model = tiny_model(dataclasses.replace(TINY, max_position_embeddings=12)).eval()
    prompt = [5, 9, 2, 7]
    answer = list(stream(model, prompt, max_tokens=50, stop_ids=()))
    assert len(answer) == 12 - 4 + 1  # the last token is drawn from a full context
    assert greedy_answers(model, [prompt], max_tokens=50, stop_ids=()) == [answer]
    with pytest.raises(UserError) as caught:
        list(stream(model, list(range(12)), max_tokens=1, stop_ids=()))
    assert caught.value.message == "the prompt has 12 tokens; the model's context holds 12"
    with pytest.raises(UserError, match="the prompt is empty"):
        list(stream(model, [], max_tokens=1, stop_ids=()))
