"""Text from our decoder, one prompt or many."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mule.errors import ModelError, UserError
from mule.generate.engine import greedy_answers, stream
from mule.generate.sampler import Sampling
from tests.tiny import TINY, tiny_model


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


def test_a_seed_decides_what_is_drawn() -> None:
    model = tiny_model().eval()
    [prompt, *_] = prompts()
    settings = {"max_tokens": 12, "stop_ids": (), "vocab_size": 83}
    drawn = [
        list(stream(model, prompt, sampling=Sampling(temperature=2.0, seed=seed), **settings))
        for seed in (4, 4, 5)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert max(max(answer) for answer in drawn) < 83, "a padding row was drawn"


def test_a_model_that_gives_nan_is_named() -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    for answer in (
        lambda: list(stream(model, prompts()[0], max_tokens=2, stop_ids=())),
        lambda: greedy_answers(model, prompts(), max_tokens=2, stop_ids=()),
    ):
        with pytest.raises(ModelError, match="the model gave NaN instead of logits"):
            answer()
