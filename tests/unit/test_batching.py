"""The engine that answers many requests at once, against one at a time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mule import fsio
from mule.errors import UserError
from mule.generate import batching
from mule.generate.batching import BatchEngine
from mule.generate.engine import greedy_answers
from mule.generate.forward import Forward, ModuleForward, Part
from mule.generate.native.decoder import NativeForward, can_be_native
from mule.generate.request import Ended, Event, Request, Token
from mule.generate.sampler import Sampling
from mule.models.config import RopeScaling
from mule.models.decoder import Decoder
from mule.models.families import qwen3
from tests.parity.tiny_gguf import tiny_tokenizer
from tests.tiny import TINY, tiny_model

CONFIG = dataclasses.replace(
    TINY, vocab_size=640, max_position_embeddings=192, intermediate_size=1100
)
KINDS = (NativeForward, ModuleForward)
Kind = Callable[[Decoder, int, int], Forward]


class Listener:
    """Keeps the events of an answer; `act` is called with each."""

    def __init__(self, act: Callable[[Event], None] = lambda event: None) -> None:
        self.events: list[Event] = []
        self._act, self._ended = act, threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Ended):
            self._ended.set()
        self._act(event)

    def wait(self) -> Ended:
        assert self._ended.wait(60)
        [end] = [event for event in self.events if isinstance(event, Ended)]
        assert self.events[-1] is end
        return end

    @property
    def ids(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Token)]


def random_ids(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 590, (length,), generator=generator).tolist())


def greedy(ids: tuple[int, ...], max_tokens: int, **more: Any) -> Request:
    more.setdefault("stop_ids", frozenset())
    return Request(ids, max_tokens, Sampling(), **more)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    monkeypatch.setattr(batching, "open_forward", request.param)
    return request.param


@pytest.fixture
def model() -> Decoder:
    """Its logits are spread, so that no margin is small."""
    model = tiny_model(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0) if parameter.ndim > 1 else None
    return model


@pytest.fixture
def engine(kind: Kind, model: Decoder) -> Iterator[BatchEngine]:
    engine = BatchEngine(model, tiny_tokenizer(), max_rows=3)
    yield engine
    engine.close()


def expected(model: Decoder, ids: tuple[int, ...], max_tokens: int) -> list[int]:
    [answer] = greedy_answers(
        model, [ids], max_tokens=max_tokens, stop_ids=(), vocab_size=tiny_tokenizer().vocab_size
    )
    return answer


def test_this_machine_computes_natively(model: Decoder) -> None:
    assert can_be_native(model)


def test_answers_do_not_depend_on_the_others(engine: BatchEngine, model: Decoder) -> None:
    """Seven requests on three rows: they join and leave at different times."""
    lengths = ((5, 30), (70, 4), (1, 50), (150, 9), (33, 1), (12, 22), (5, 17))
    requests = [greedy(random_ids(n, seed), most) for seed, (n, most) in enumerate(lengths)]
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        engine.submit(request, listener)
    for request, listener in zip(requests, listeners, strict=True):
        end = listener.wait()
        assert listener.ids == expected(model, request.ids, request.max_tokens)
        assert (end.reason, end.num_prompt) == ("length", len(request.ids))
        assert end.num_tokens == request.max_tokens


def test_an_answer_is_cut_at_a_stop_token(engine: BatchEngine, model: Decoder) -> None:
    free = expected(model, random_ids(9, 1), 12)
    listener = Listener()
    engine.submit(greedy(random_ids(9, 1), 12, stop_ids=frozenset({free[5]})), listener)
    assert listener.wait().reason == "stop"
    assert listener.ids == free[: free.index(free[5])]


def test_a_full_context_ends_the_answer(engine: BatchEngine, model: Decoder) -> None:
    ids, listener = random_ids(185, 1), Listener()
    engine.submit(greedy(ids, 50), listener)
    assert listener.wait().reason == "context"
    assert listener.ids == expected(model, ids, 50)
    assert len(listener.ids) == 192 - 185 + 1


def test_a_conversation_continues_from_its_cache(engine: BatchEngine, model: Decoder) -> None:
    first, second, third = (Listener() for _ in range(3))
    ids = random_ids(40, 1)
    engine.submit(greedy(ids, 10), first)
    assert first.wait().num_cached == 0
    longer = (*ids, *first.ids, *random_ids(7, 2))
    engine.submit(greedy(longer, 10), second)
    assert second.wait().num_cached == 49  # the last token of the answer was never computed
    assert second.ids == expected(model, longer, 10)
    engine.submit(greedy(ids, 10), third)  # all but the last token, whose logits are wanted
    assert third.wait().num_cached == 39
    assert third.ids == first.ids


def test_a_beginning_is_shared_with_an_answer_under_way(
    engine: BatchEngine, model: Decoder
) -> None:
    """Four requests with one system prompt: it is computed once, whoever is still answering."""
    system = random_ids(100, 3)
    requests = [greedy((*system, *random_ids(9, seed)), 20) for seed in range(4, 8)]
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        engine.submit(request, listener)
    assert [listener.wait().num_cached for listener in listeners] == [0, 100, 100, 100]
    for request, listener in zip(requests, listeners, strict=True):
        assert listener.ids == expected(model, request.ids, 20)


def test_texts_that_outgrow_the_original_context(kind: Kind) -> None:
    """LongRoPE: all positions turn otherwise beyond 64 tokens, also those in the cache."""
    pairs = TINY.head_dim // 2
    scaling = RopeScaling(
        "longrope",
        factor=3.0,
        original_max_position_embeddings=64,
        short_factor=(1.0,) * pairs,
        long_factor=(3.0,) * pairs,
    )
    model = tiny_model(dataclasses.replace(CONFIG, rope_scaling=scaling)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0) if parameter.ndim > 1 else None
    engine = BatchEngine(model, tiny_tokenizer(), max_rows=3)
    prompts = [random_ids(n, n) for n in (50, 60, 64, 65, 100)]
    listeners = [Listener() for _ in prompts]
    for ids, listener in zip(prompts, listeners, strict=True):
        engine.submit(greedy(ids, 20), listener)
    for ids, listener in zip(prompts, listeners, strict=True):
        listener.wait()
        assert listener.ids == expected(model, ids, 20)
    again, longer = Listener(), (*prompts[0][:30], *random_ids(50, 5))
    engine.submit(greedy(longer, 5), again)  # nothing known: those were the keys of a short text
    assert again.wait().num_cached == 0
    assert again.ids == expected(model, longer, 5)
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_token_gives_does_not_depend_on_the_call(model: Decoder, dtype: torch.dtype) -> None:
    """To the last bit: in pieces, beside others, in a longer call."""
    ids, other = random_ids(140, 1), random_ids(90, 2)
    forward = NativeForward(model.to(dtype), 3, 192)

    def logits(*cuts: int, slot: int, beside: bool = False) -> torch.Tensor:
        found = torch.empty(0)
        for start, end in pairwise(cuts):
            parts = [Part(slot, start, ids[start:end], 140, end == 140)]
            if beside:
                parts.insert(0, Part(0, start // 2, other[start // 2 : end // 2], 90, False))
            found = forward.extend(parts)
        return found[0]

    alone = logits(0, 140, slot=1)
    assert torch.equal(logits(0, 3, 64, 65, 139, 140, slot=2), alone)
    assert torch.equal(logits(0, 100, 140, slot=1, beside=True), alone)
    forward.copy(1, 2, 120)
    assert torch.equal(logits(120, 140, slot=2), alone)
    several = [Part(n, 139, ids[139:], 140, True) for n in (1, 2)]
    assert torch.equal(forward.extend(several), torch.stack((alone, alone)))


def test_the_number_of_threads_changes_nothing(model: Decoder) -> None:
    ids, before = random_ids(40, 1), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            forward = NativeForward(model, 1, 64)
            prompt = forward.extend([Part(0, 0, ids, 40, True)])
            found.append((prompt, forward.extend([Part(0, 40, [7], 41, True)])))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_bf16_answers_nearly_as_its_modules_do(model: Decoder) -> None:
    """Natively only the cache rounds: closer to the exact result than the modules, which round all."""
    ids = random_ids(60, 1)
    rounded = model.to(torch.bfloat16)
    [native], [modules] = (
        kind(rounded, 1, 64).extend([Part(0, 0, ids, 60, True)]) for kind in KINDS
    )
    with torch.no_grad():
        exact = model.float()(torch.tensor([ids]))[0, -1]
    assert (native - exact).abs().max() < 0.6 * (modules - exact).abs().max()


def test_a_cancelled_answer_ends_at_once(engine: BatchEngine) -> None:
    seen = threading.Event()
    running, waiting = Listener(lambda event: seen.set()), [Listener() for _ in range(4)]
    jobs = [engine.submit(greedy(random_ids(3, 1), 180), running)]
    jobs += [engine.submit(greedy(random_ids(3, 2), 180), one) for one in waiting]
    assert seen.wait(60)
    for job in jobs:
        job.cancel()
    for listener in (running, *waiting):
        assert listener.wait().reason == "cancelled"
    assert 0 < running.wait().num_tokens < 180
    after = Listener()
    engine.submit(greedy(random_ids(3, 3), 2), after)
    assert after.wait().reason == "length"
    jobs[0].cancel()  # long over: nothing happens


def test_closing_cancels_and_refuses(kind: Kind, model: Decoder) -> None:
    engine = BatchEngine(model, tiny_tokenizer(), max_rows=1)
    listeners = [Listener() for _ in range(3)]
    for listener in listeners:
        engine.submit(greedy(random_ids(3, 1), 180), listener)
    engine.close()
    assert {listener.wait().reason for listener in listeners} <= {"cancelled", "length"}
    assert listeners[-1].wait().reason == "cancelled"
    with pytest.raises(UserError, match="the engine is closed\nhint: start it again"):
        engine.submit(greedy(random_ids(3, 1), 1), Listener())
    engine.close()  # twice is once


def test_an_error_in_a_step_ends_its_requests_only(
    engine: BatchEngine, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = engine._forward.extend

    def failing(parts: Any) -> torch.Tensor:
        monkeypatch.setattr(engine._forward, "extend", extend)
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(engine._forward, "extend", failing)
    broken, well = Listener(), Listener()
    ids = random_ids(20, 1)
    engine.submit(greedy(ids, 5), broken)
    end = broken.wait()
    assert (end.reason, end.error) == ("failed", "RuntimeError: no kernel image")
    engine.submit(greedy(ids, 5), well)
    assert well.wait().num_cached == 0  # what the failed step left is not trusted
    assert well.ids == expected(model, ids, 5)


def test_logits_that_are_no_numbers_fail_one_request(engine: BatchEngine, model: Decoder) -> None:
    weights = model.model.embed_tokens.weight
    with torch.no_grad():
        weights[639] = float("nan")  # a padding row: in the prompt of one, never drawn
    sick, well = Listener(), Listener()
    engine.submit(greedy((639, 1, 2), 5), sick)
    engine.submit(greedy((3, 1, 2), 5), well)
    assert sick.wait().reason == "failed"
    assert sick.wait().error == "the model gave NaN instead of logits"
    assert well.wait().reason == "length"
    again = Listener()
    engine.submit(greedy((4, 1, 2), 5), again)  # in the slot that held NaN
    assert again.wait().reason == "length"


def test_a_listener_that_fails_harms_nobody(engine: BatchEngine, model: Decoder) -> None:
    def fail(event: Event) -> None:
        raise ValueError("gone")

    rude, polite = Listener(fail), Listener()
    engine.submit(greedy(random_ids(5, 1), 9), rude)
    engine.submit(greedy(random_ids(5, 2), 9), polite)
    assert polite.wait().reason == "length"
    assert rude.wait().reason == "cancelled"


def test_the_seed_decides_whatever_else_is_computed(engine: BatchEngine) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=5)
    texts = []
    for num_others in (0, 2):
        listener, others = Listener(), [Listener() for _ in range(num_others)]
        for seed, other in enumerate(others):
            engine.submit(greedy(random_ids(4, seed), 30), other)
        request = Request(random_ids(6, 9), 15, sampling, frozenset(), top_logprobs=2)
        engine.submit(request, listener)
        listener.wait()
        texts.append(listener.ids)
        tokens = [event for event in listener.events if isinstance(event, Token)]
        assert all(token.logprob is not None and len(token.top) == 2 for token in tokens)
        for other in others:
            other.wait()
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("ids", "max_tokens", "message"),
    [
        ((), 1, "the prompt is empty\nhint: give at least one word"),
        (
            (5,) * 192,
            1,
            "the prompt has 192 tokens; the context holds 192\n"
            "hint: shorten it to at most 191 tokens, or start a new conversation",
        ),
        ((5,), 0, "max_tokens is 0; an answer has at least 1\nhint: set max_tokens to 1"),
        (
            (5, 640),
            1,
            "token id 640 is not in the model, which has 640\n"
            "hint: encode the prompt with the model's own tokenizer",
        ),
        ((-1,), 1, "token id -1 is not in the model"),
    ],
)
def test_what_can_never_be_answered(
    model: Decoder, ids: tuple[int, ...], max_tokens: int, message: str
) -> None:
    engine = BatchEngine(model, tiny_tokenizer(), max_rows=1)
    with pytest.raises(UserError) as caught:
        engine.submit(greedy(ids, max_tokens), Listener())
    assert str(caught.value).startswith(message)
    engine.close()


def test_the_context_that_is_asked_for(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in (1, 193):
        with pytest.raises(UserError) as caught:
            BatchEngine(model, tiny_tokenizer(), context_tokens=wanted)
        assert caught.value.message == (
            f"a context of {wanted} tokens was asked for; the model's holds 192"
        )
        assert caught.value.hint == "ask for 2 to 192 tokens"
    engine = BatchEngine(model, tiny_tokenizer(), context_tokens=50)
    assert (engine.context_tokens, engine.vocab_size) == (50, tiny_tokenizer().vocab_size)
    assert engine.cache_bytes_per_token == 2 * 3 * 2 * 10 * 4
    engine.close()
    monkeypatch.setattr(batching.machine, "available_bytes", lambda: 480 * 8 * 200)
    engine = BatchEngine(model, tiny_tokenizer())
    assert engine.context_tokens == 100  # 8 slots of it take half of what is free
    engine.close()
    monkeypatch.setattr(batching.machine, "available_bytes", lambda: 480 * 8)
    with pytest.raises(UserError, match="no memory for a cache\nhint: serve fewer rows"):
        BatchEngine(model, tiny_tokenizer())


def test_text_and_chats_are_encoded_as_the_tokenizer_does(engine: BatchEngine) -> None:
    tokenizer = tiny_tokenizer()
    chat = [{"role": "user", "content": "And again, 3 times?"}]
    assert engine.encode_chat(chat) == tokenizer.encode_prompt(chat)
    assert engine.encode("the sea") == tokenizer.encode("the sea")
    assert b"".join(map(engine.piece, engine.encode("à la plage"))).decode() == "à la plage"


def test_weights_stored_in_bf16_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching.machine, "has_fast_bf16", lambda: False)
    for stored, adapted, expected in (
        ("bfloat16", False, torch.bfloat16),
        ("bfloat16", True, torch.float32),  # through the modules, where bf16 is slow
        ("float32", False, torch.float32),
        ("float16", False, torch.float32),
    ):
        fsio.write_json(tmp_path / "config.json", qwen3.to_hf(TINY) | {"torch_dtype": stored})
        assert batching.serving_dtype(tmp_path, adapted=adapted) == expected
    monkeypatch.setattr(batching.machine, "has_fast_bf16", lambda: True)
    assert batching.serving_dtype(tmp_path, adapted=True) == torch.bfloat16
