"""Many requests at once in llama.cpp: the answers of single ones, shared beginnings, crashes."""

from __future__ import annotations

import json
import os
import queue
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from mule.errors import ModelError, UserError
from mule.export.gguf import write_gguf
from mule.generate import gguf_memory
from mule.generate.gguf_header import read_header
from mule.generate.llamacpp import LlamaCpp
from mule.generate.llamacpp_batching import LlamaCppEngine
from mule.generate.request import Ended, Event, Request, Token
from mule.generate.sampler import Sampling
from tests.parity.tiny_families import save_family
from tests.parity.tiny_gguf import PROMPTS, TEXTS, save_tiny, tiny_tokenizer

GREEDY = Sampling()
LONG = tiny_tokenizer().encode(TEXTS[3])[:200]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batching")
    save_tiny(folder, "qwen3", num_hidden_layers=2)
    write_gguf(folder, folder / "m.gguf", "f32")
    return folder / "m.gguf"


@pytest.fixture(scope="module")
def engine(file: Path) -> Iterator[LlamaCppEngine]:
    opened = LlamaCppEngine(file, context_tokens=512, max_rows=4, threads=1, exact=True)
    yield opened
    opened.close()


class Answer:
    """Collects what an engine delivers for one request."""

    def __init__(self, engine: LlamaCppEngine, request: Request) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.tokens: list[Token] = []
        self.job = engine.submit(request, self.events.put)

    def next(self) -> Event:
        return self.events.get(timeout=30)

    def wait(self) -> Ended:
        while not isinstance(event := self.next(), Ended):
            self.tokens.append(event)
        return event

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def answered(engine: LlamaCppEngine, request: Request) -> tuple[list[int], Ended]:
    answer = Answer(engine, request)
    ended = answer.wait()
    return answer.ids, ended


def asked(ids: list[int], max_tokens: int = 16, **fields: Any) -> Request:
    endless = {"sampling": GREEDY, "stop_ids": frozenset()}
    return Request(tuple(ids), max_tokens, **endless | fields)


# ---------------------------------------------------------------- answers


def test_answers_together_are_those_alone(engine: LlamaCppEngine, file: Path) -> None:
    starts = [LONG[start : start + 9 + 11 * start] for start in range(10)]
    requests = [asked(ids, 12 + number) for number, ids in enumerate(starts)]
    with LlamaCpp(file, n_ctx=512, threads=1, exact=True) as alone:
        expected = [
            list(alone.generate(r.ids, max_tokens=r.max_tokens, stop_ids=[])) for r in requests
        ]
    together = [Answer(engine, request) for request in requests]  # more than there are rows
    for answer, request, ids in zip(together, requests, expected, strict=True):
        ended = answer.wait()
        assert answer.ids == ids
        assert (ended.reason, ended.num_prompt) == ("length", len(request.ids))
        assert ended.num_tokens == len(ids)
    sampled = asked(LONG[:20], sampling=Sampling(temperature=1.5, seed=3))
    alone_ids, _ = answered(engine, sampled)
    pair = [Answer(engine, sampled), Answer(engine, asked(LONG[:90], 40))]
    for answer in pair:
        answer.wait()
    assert pair[0].ids == alone_ids  # its random numbers are its own


def test_a_shared_beginning_is_computed_once(engine: LlamaCppEngine) -> None:
    begin = tiny_tokenizer().encode(TEXTS[1])
    alone, first = answered(engine, asked(begin, 30))
    assert first.num_cached <= 1
    again, second = answered(engine, asked(begin, 30))
    assert second.num_cached == len(begin) - 1 and again == alone
    longer = begin + alone[:20]  # the chat goes on
    _, third = answered(engine, asked([*longer, 5]))
    assert third.num_cached == len(longer)
    running = Answer(engine, asked(begin + LONG[:40], 120))
    running.next()
    beside = Answer(engine, asked(begin + LONG[:40] + [7]))  # of a row that is in use
    assert beside.wait().num_cached == len(begin) + 40
    running.job.cancel()
    assert running.wait().reason == "cancelled"


def test_the_least_used_row_is_taken_over(engine: LlamaCppEngine) -> None:
    prompts = [[20 + number] * 30 for number in range(5)]
    for ids in prompts:
        answered(engine, asked(ids, 2))
    assert answered(engine, asked(prompts[4], 2))[1].num_cached == 29
    assert answered(engine, asked(prompts[0], 2))[1].num_cached == 0
    assert answered(engine, asked(prompts[3], 2))[1].num_cached == 29


def test_a_short_cache_makes_requests_wait_for_room(file: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_memory, "_MAX_SHARE", 0.0)
        engine = LlamaCppEngine(file, context_tokens=256, max_rows=4, threads=1, exact=True)
    try:
        many = [Answer(engine, asked([30 + number] * 100, 60)) for number in range(5)]
        assert [answer.wait().reason for answer in many] == ["length"] * 5
        alone, _ = answered(engine, asked([30] * 100, 60))
        assert many[0].ids == alone
    finally:
        engine.close()


def test_an_answer_ends_at_stop_tokens_stop_texts_and_the_context(engine: LlamaCppEngine) -> None:
    free = Answer(engine, asked(LONG[:30], 20))
    free.wait()
    text = "".join(token.text for token in free.tokens)
    ids, ended = answered(engine, asked(LONG[:30], 20, stop_ids=frozenset({free.ids[4]})))
    assert ids == free.ids[: free.ids.index(free.ids[4])] and ended.reason == "stop"
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = Answer(engine, asked(LONG[:30], 20, stop=(stop,)))
    ended = stopped.wait()
    shown = "".join(token.text for token in stopped.tokens) + ended.text
    assert shown == text[: text.index(stop)] and ended.reason == "stop"
    ids, ended = answered(engine, asked([5] * 506, 99))
    assert len(ids) == 7 and ended.reason == "context"


def test_logprobs_are_of_the_model(engine: LlamaCppEngine, file: Path) -> None:
    answer = Answer(engine, asked(LONG[:30], 3, top_logprobs=4))
    answer.wait()
    with LlamaCpp(file, n_ctx=512, threads=1, exact=True) as alone:
        row = alone.logits(LONG[:30])[-1, : alone.vocab_size].astype(np.float64)
    expected = row - np.log(np.exp(row - row.max()).sum()) - row.max()
    best = np.argsort(-expected)[:4]
    assert [token for token, _ in answer.tokens[0].top] == best.tolist()
    assert [value for _, value in answer.tokens[0].top] == pytest.approx(expected[best], abs=1e-4)
    assert answer.tokens[0].logprob == pytest.approx(expected[best[0]], abs=1e-4)


def test_an_answer_follows_its_schema(engine: LlamaCppEngine) -> None:
    pytest.importorskip("llguidance")
    schema = json.dumps({"type": "array", "items": {"type": "boolean"}, "maxItems": 2})
    answer = Answer(engine, asked(LONG[:30], 60, schema=schema, stop_ids=None))
    ended = answer.wait()
    shown = "".join(token.text for token in answer.tokens) + ended.text
    assert ended.reason == "stop" and set(json.loads(shown)) <= {True, False}
    with pytest.raises(UserError, match="the JSON schema is not JSON"):
        engine.submit(asked(LONG[:9], schema="{"), print)


def test_text_and_chats_become_the_tokenizers_ids(engine: LlamaCppEngine) -> None:
    tokenizer = tiny_tokenizer()
    assert engine.encode("a<|im_end|>") == tokenizer.encode("a<|im_end|>")
    assert engine.encode_chat(PROMPTS[1]) == tokenizer.encode_prompt(PROMPTS[1])
    assert engine.piece(tokenizer.eos_id) == b"<|im_end|>" and engine.chat
    assert engine.vocab_size == tokenizer.vocab_size and engine.context_tokens == 512


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (asked([]), "the prompt has 0 tokens"),
        (asked([5] * 512), "the prompt has 512 tokens; the model's context holds 512"),
        (asked([619]), r"a token of the prompt is outside 0\.\.618"),
        (asked([-1]), r"a token of the prompt is outside 0\.\.618"),
        (asked([5], 0), "max_tokens is 0; it must be between 1 and"),
        (asked([5], 2**31), "max_tokens is 2147483648"),
        (asked([5], stop=("",)), "a stop text is empty"),
        (asked([5], top_logprobs=99), "top_logprobs is 99"),
    ],
)
def test_an_impossible_request_is_refused(
    engine: LlamaCppEngine, request_: Request, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        engine.submit(request_, print)
    assert answered(engine, asked(LONG[:9], 2))[1].reason == "length"


def test_a_token_that_is_not_there_has_no_piece(engine: LlamaCppEngine) -> None:
    with pytest.raises(UserError, match="there is no token 619"):
        engine.piece(619)


def test_a_context_beyond_the_memory_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = read_header(file)
    assert gguf_memory.cache_token_bytes(header) == 2 * 2 * (64 + 64) * 2  # layers, heads, k and v
    free = header.size_bytes + 1000 * 1024
    monkeypatch.setattr("mule.machine.available_bytes", lambda: free)
    with pytest.raises(ModelError, match="a context of 4,096 tokens takes") as error:
        LlamaCppEngine(file, context_tokens=4096)
    assert "--context 768" in error.value.hint
    monkeypatch.setattr("mule.machine.available_bytes", lambda: 0)
    with pytest.raises(ModelError, match=r"0\.0 GiB are free beside the file") as error:
        LlamaCppEngine(file, context_tokens=512)
    assert "close other programs" in error.value.hint


# ---------------------------------------------------------------- crashes


def test_a_crash_ends_its_requests_and_the_next_one_starts_again(file: Path) -> None:
    engine = LlamaCppEngine(file, context_tokens=512, max_rows=2, threads=1)
    try:
        expected, _ = answered(engine, asked(LONG[:9], 5))
        lost = [Answer(engine, asked(LONG[:9], 400)) for _ in range(3)]
        lost[0].next()
        os.kill(engine._model._process.pid, signal.SIGABRT)
        for answer in lost:
            ended = answer.wait()
            assert ended.reason == "failed" and "llama.cpp crashed (SIGABRT)" in ended.error
        assert answered(engine, asked(LONG[:9], 5))[0] == expected
        engine._model._torn = True  # Ctrl-C in the middle of a message
        assert answered(engine, asked(LONG[:9], 5))[0] == expected
        for _ in range(2):  # twice without an answer in between
            os.kill(engine._model._process.pid, signal.SIGABRT)
            engine._model._process.wait()
            if engine._was_restarted and not engine._has_answered:
                break
            engine.encode("a")
        with pytest.raises(ModelError, match="it was started again after a crash before"):
            engine.submit(asked(LONG[:9]), print)
    finally:
        engine.close()
    with pytest.raises(UserError, match="the engine was closed"):
        engine.submit(asked(LONG[:9]), print)


def test_closing_cancels_what_is_worked_on(file: Path) -> None:
    engine = LlamaCppEngine(file, context_tokens=512, max_rows=1, threads=1)
    answers = [Answer(engine, asked(LONG[:9], 400)) for _ in range(2)]
    answers[0].next()
    engine.close()
    assert [answer.wait().reason for answer in answers] == ["cancelled", "cancelled"]


def test_a_caller_that_is_gone_disturbs_nobody(engine: LlamaCppEngine) -> None:
    def gone(_: Event) -> None:
        raise RuntimeError("Event loop is closed")

    engine.submit(asked(LONG[:9], 50), gone)
    assert answered(engine, asked(LONG[:40], 5))[1].reason == "length"


# ---------------------------------------------------------------- other kinds of memory


def write_mamba(file: Path, other: Path) -> None:
    """A recurrent model of random weights with the tokenizer of another file."""
    writer, hidden, inner, state, rank = GGUFWriter(file, "mamba"), 64, 128, 16, 4
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(2)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    known = read_header(other).metadata
    writer.add_tokenizer_model(known["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(known["tokenizer.ggml.pre"])
    writer.add_token_list(known["tokenizer.ggml.tokens"])
    writer.add_token_types(known["tokenizer.ggml.token_type"])
    writer.add_token_merges(known["tokenizer.ggml.merges"])
    writer.add_eos_token_id(known["tokenizer.ggml.eos_token_id"])
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(known["tokenizer.ggml.tokens"]), hidden),
        "output_norm.weight": (hidden,),
    }
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (hidden,),
            f"blk.{layer}.ssm_in.weight": (2 * inner, hidden),
            f"blk.{layer}.ssm_conv1d.weight": (inner, 4),
            f"blk.{layer}.ssm_conv1d.bias": (inner,),
            f"blk.{layer}.ssm_x.weight": (rank + 2 * state, inner),
            f"blk.{layer}.ssm_dt.weight": (inner, rank),
            f"blk.{layer}.ssm_dt.bias": (inner,),
            f"blk.{layer}.ssm_a": (inner, state),
            f"blk.{layer}.ssm_d": (inner,),
            f"blk.{layer}.ssm_out.weight": (hidden, inner),
        }
    for name, shape in shapes.items():
        values = 0.3 * random.standard_normal(shape).astype(np.float32)
        if name.endswith("ssm_a"):
            values = -np.abs(values) - 0.1
        writer.add_tensor(name, values + (len(shape) == 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["mamba", "gemma3"])
def test_recurrent_and_windowed_models_share_steps_too(
    kind: str, file: Path, tmp_path: Path
) -> None:
    if kind == "mamba":
        write_mamba(tmp_path / "m.gguf", file)
    else:
        save_family(tmp_path, kind)
        write_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    requests = [asked(LONG[start : start + 30 + 9 * start], 20) for start in range(4)]
    with LlamaCpp(tmp_path / "m.gguf", n_ctx=256, threads=1, exact=True) as alone:
        expected = [list(alone.generate(r.ids, max_tokens=20, stop_ids=[])) for r in requests]
        chat = [*requests[0].ids, *expected[0][:-1]]
        expected_next = list(alone.generate([*chat, 9, 8], max_tokens=9, stop_ids=[]))
    engine = LlamaCppEngine(
        tmp_path / "m.gguf", context_tokens=256, max_rows=3, threads=1, exact=True
    )
    try:
        together = [Answer(engine, request) for request in requests]
        for answer in together:
            answer.wait()
        assert [answer.ids for answer in together] == expected
        ids, ended = answered(engine, asked([*chat, 9, 8], 9))
        assert ids == expected_next and ended.num_cached in (len(chat), 0)
        assert answered(engine, asked([*chat[:-4], 9, 8], 9))[1].reason == "length"
        assert engine.chat is (kind != "mamba")  # the file has no template
    finally:
        engine.close()
