"""Many requests at once to models with a recurrent state, against one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from mule.generate.batching import BatchEngine
from mule.generate.forward import ModuleForward
from mule.generate.native.decoder import can_be_native
from mule.generate.slots import Slots
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from tests.parity.tiny_gguf import tiny_tokenizer
from tests.tiny_mamba import HYBRID2, PURE1, PURE2, loud_model
from tests.unit.test_batching import Listener, expected, greedy, random_ids

CONFIGS = {
    name: dataclasses.replace(config, vocab_size=640, max_position_embeddings=192)
    for name, config in {"mamba2": PURE2, "hybrid": HYBRID2, "mamba1": PURE1}.items()
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return loud_model(CONFIGS[request.param])


@pytest.fixture
def engine(model: Decoder) -> Iterator[BatchEngine]:
    engine = BatchEngine(model, tiny_tokenizer(), max_rows=3)
    yield engine
    engine.close()


def answered(engine: BatchEngine, ids: tuple[int, ...], max_tokens: int) -> tuple[list[int], int]:
    """The tokens of an answer, and how many of the prompt's were not computed again."""
    listener = Listener()
    engine.submit(greedy(ids, max_tokens), listener)
    return listener.ids if (end := listener.wait()) else [], end.num_cached


def test_they_are_computed_by_the_modules(engine: BatchEngine, model: Decoder) -> None:
    assert not can_be_native(model)
    assert isinstance(engine._forward, ModuleForward)


def test_answers_do_not_depend_on_the_others(engine: BatchEngine, model: Decoder) -> None:
    """They join and leave at different times, in slots that held other texts."""
    lengths = ((5, 20), (70, 4), (1, 30), (33, 1), (12, 12), (5, 9))
    requests = [greedy(random_ids(n, seed), most) for seed, (n, most) in enumerate(lengths)]
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        engine.submit(request, listener)
    for request, listener in zip(requests, listeners, strict=True):
        listener.wait()
        assert listener.ids == expected(model, request.ids, request.max_tokens)


def test_a_conversation_goes_on_from_its_state(engine: BatchEngine, model: Decoder) -> None:
    first = random_ids(20, 1)
    answer, _ = answered(engine, first, 8)
    second = (*first, *answer, *random_ids(6, 2))
    again, num_cached = answered(engine, second, 8)
    assert num_cached == 20 + 7  # the last token that was drawn had not been computed
    assert again == expected(model, second, 8)


def test_a_shared_beginning_is_computed_again(engine: BatchEngine, model: Decoder) -> None:
    """The state is that of the whole text: what came after the shared part is in it."""
    first = random_ids(20, 1)
    answered(engine, first, 8)
    other = (*first[:15], *random_ids(9, 3))
    answer, num_cached = answered(engine, other, 8)
    assert num_cached == 0
    assert answer == expected(model, other, 8)


def test_slots_know_whole_texts_only() -> None:
    slots = Slots(2, whole=True)
    slot, _, known = slots.claim([1, 2, 3], is_long=False)
    slot.ids = [1, 2, 3, 4]
    slots.release(slot)
    assert known == 0
    assert slots.known([1, 2, 3, 4, 5], is_long=False) == 4
    assert slots.known([1, 2, 3, 5], is_long=False) == 0
    assert slots.known([1, 2, 3, 4], is_long=False) == 0  # the last token is always computed


def test_the_context_is_the_models_where_no_token_takes_memory() -> None:
    config: ModelConfig = CONFIGS["mamba2"]
    engine = BatchEngine(loud_model(config), tiny_tokenizer(), max_rows=2)
    engine.close()
    assert engine.context_tokens == 192 and engine.cache_bytes_per_token == 0
